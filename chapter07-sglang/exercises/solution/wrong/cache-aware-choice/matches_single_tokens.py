"""Counts tokens of a page that is not cached whole."""

SAYS = "both have"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    return choose(prompt, workers, limit, 1)
