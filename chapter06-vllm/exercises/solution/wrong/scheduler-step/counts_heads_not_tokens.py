"""Takes the budget for a number of requests."""

SAYS = "expected the chunks"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    step = schedule(waiting, running, free_blocks, block_size, 10**9)
    step.chunks = step.chunks[:token_budget]
    return step
