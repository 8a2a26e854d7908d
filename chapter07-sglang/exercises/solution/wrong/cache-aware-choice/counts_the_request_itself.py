"""Writes the new request down in the worker."""

SAYS = "only choose"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    name = choose(prompt, workers, limit, page_size)
    for worker in workers:
        worker.requests += worker.name == name
    return name
