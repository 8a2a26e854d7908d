"""Sends also what the decode engine has already."""

SAYS = "is present"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    return blocks_to_send(steps, cached, 0, block_size, source, target)
