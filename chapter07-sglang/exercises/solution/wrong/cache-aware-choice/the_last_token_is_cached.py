"""Takes a prompt that is cached to its end for nothing to compute."""

SAYS = "b"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import choose

    return choose([*prompt, -1], workers, limit, page_size)
