"""Looks at one of a worker's cached sequences."""

SAYS = "its third sequence is the best"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, cached=w.cached[:1]) for w in workers], limit, page_size)
