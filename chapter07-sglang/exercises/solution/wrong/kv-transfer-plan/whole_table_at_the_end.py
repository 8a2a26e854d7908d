"""Sends the rest of the table at the end, with blocks that hold nothing."""

SAYS = "to be sent after step"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send(steps, cached, present, block_size, source, target)
    first = -(-(cached + sum(steps)) // block_size)
    plan[-1] += list(zip(source[first:], target[first:], strict=False))
    return plan
