"""Preempts for running requests that get no token in this step."""

SAYS = "who gets no token needs no block"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    step = schedule([], running, free_blocks, block_size, 10**9)
    plain = schedule(waiting, running, free_blocks, block_size, token_budget)
    if step.preempted and not plain.preempted:
        plain.preempted = step.preempted
    return plain
