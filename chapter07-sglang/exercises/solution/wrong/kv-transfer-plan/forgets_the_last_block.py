"""Sends whole blocks, and no other."""

SAYS = "the last one is not full"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send([*steps, 0], cached, present, block_size, source, target)
    return plan[:-1]
