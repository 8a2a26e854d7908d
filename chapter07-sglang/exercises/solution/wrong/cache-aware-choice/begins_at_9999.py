"""Looks for a cost below 9,999, as if queues were never so long."""

SAYS = "queues of any length"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    free = [worker for worker in workers if worker.queued + len(prompt) < 9999]
    return choose(prompt, free, limit, page_size)
