"""Lets a step have one token more than its budget."""

SAYS = "expected the chunks"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    return schedule(waiting, running, free_blocks, block_size, token_budget + 1)
