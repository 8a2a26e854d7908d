"""Counts the steps' tokens from 0 instead of from the cached prefix."""

SAYS = "cached"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    return blocks_to_send(steps, 0, present, block_size, source, target)
