"""Sorts the list that it was given."""

SAYS = "only choose"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    name = choose(prompt, workers, limit, page_size)
    workers.sort(key=lambda worker: worker.queued)
    workers.reverse()
    return name
