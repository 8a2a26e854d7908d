"""Passes over a large prompt that finds no room, for ever while small ones arrive."""

SAYS = "nobody overtakes"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    fitting = [r for r in waiting if -(-r.tokens // block_size) <= free_blocks]
    return schedule(fitting, running, free_blocks, block_size, token_budget)
