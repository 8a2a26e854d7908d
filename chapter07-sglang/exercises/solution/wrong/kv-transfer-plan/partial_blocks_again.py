"""Sends a block that is not full with each step, and again when it is."""

SAYS = "to be sent after step"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send(steps, cached, present, block_size, source, target)
    for number in range(len(steps) - 1):
        done = cached + sum(steps[: number + 1])
        block = done // block_size
        if done % block_size and block >= present:
            plan[number].append((source[block], target[block]))
    return plan
