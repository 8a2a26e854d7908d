"""Sorts the lists that it was given."""

SAYS = "were changed; only plan"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    running.sort(key=lambda request: request.arrival)
    return schedule(waiting, running, free_blocks, block_size, token_budget)
