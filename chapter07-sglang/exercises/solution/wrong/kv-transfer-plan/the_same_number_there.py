"""Takes a block's number for the same on both sides."""

SAYS = "to be sent after step"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    return blocks_to_send(steps, cached, present, block_size, source, source)
