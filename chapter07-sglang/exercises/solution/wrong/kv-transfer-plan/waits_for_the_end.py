"""Sends everything after the last step."""

SAYS = "after step 0"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send(steps, cached, present, block_size, source, target)
    return [[]] * (len(plan) - 1) + [sum(plan, [])]
