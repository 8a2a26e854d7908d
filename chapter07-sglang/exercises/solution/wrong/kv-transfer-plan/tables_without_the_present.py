"""Takes the decode engine's table for one of the blocks that are sent."""

SAYS = "is present"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    shifted = [*([-1] * present), *target]
    return blocks_to_send(steps, cached, present, block_size, source, shifted)
