"""Compares the first two workers, and no other."""

SAYS = "expected"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    return choose(prompt, workers[:2], limit, page_size)
