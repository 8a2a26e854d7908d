"""Where all are full it chooses one all the same."""

SAYS = "expected None"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    name = choose(prompt, workers, limit, page_size)
    return name or choose(prompt, workers, 10**9, page_size)
