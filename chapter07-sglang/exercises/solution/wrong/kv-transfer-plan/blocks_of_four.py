"""Counts four tokens to a block, whatever it is told."""

SAYS = "blocks of"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    return blocks_to_send(steps, cached, present, 4, source, target)
