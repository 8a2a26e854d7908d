"""Sends one more where the limit is reached: > for >=."""

SAYS = "requests of"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    return choose(prompt, workers, limit + 1, page_size)
