"""Gives the blocks of a preempted request to one that waits."""

SAYS = "where somebody was preempted nobody is admitted"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    step = schedule(waiting, running, free_blocks, block_size, token_budget)
    if step.preempted and waiting:
        first = min(waiting, key=lambda request: request.arrival)
        step.chunks.append((first.name, first.tokens))
    return step
