"""Waits until a prompt fits into the budget as a whole."""

SAYS = "a prompt gets what is left of the budget"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    used = sum(request.tokens - request.computed for request in running)
    fitting = []
    for request in sorted(waiting, key=lambda request: request.arrival):
        used += request.tokens
        if used > token_budget:
            break
        fitting.append(request)
    return schedule(fitting, running, free_blocks, block_size, token_budget)
