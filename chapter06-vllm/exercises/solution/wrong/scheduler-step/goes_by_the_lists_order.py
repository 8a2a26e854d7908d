"""Takes the lists as they come for sorted by arrival."""

SAYS = "the running ones go by arrival"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from dataclasses import replace

    from scheduler_step import schedule

    running = [replace(request, arrival=number) for number, request in enumerate(running)]
    return schedule(waiting, running, free_blocks, block_size, token_budget)
