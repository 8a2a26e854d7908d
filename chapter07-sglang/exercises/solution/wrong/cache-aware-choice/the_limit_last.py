"""Chooses first, and gives up where that one is full."""

SAYS = "full has 4 requests of 4"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    name = choose(prompt, workers, 10**9, page_size)
    return name if name and next(w for w in workers if w.name == name).requests < limit else None
