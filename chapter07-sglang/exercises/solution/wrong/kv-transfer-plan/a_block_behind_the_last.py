"""Takes a full last block for one that goes on: // + 1 for a ceiling."""

SAYS = "to be sent after step"


def blocks_to_send(steps, cached, present, block_size, source, target):
    from kv_transfer_plan import blocks_to_send

    plan = blocks_to_send(steps, cached, present, block_size, source, target)
    total = cached + sum(steps)
    if total % block_size == 0 and total // block_size < min(len(source), len(target)):
        plan[-1].append((source[total // block_size], target[total // block_size]))
    return plan
