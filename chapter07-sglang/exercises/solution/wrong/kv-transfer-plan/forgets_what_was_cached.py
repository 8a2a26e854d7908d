"""Sends what it computes, and not what its own cache had."""

SAYS = "what is cached goes with the first step"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    own = max(present, cached // block_size)
    return blocks_to_send(steps, cached, own, block_size, source, target)
