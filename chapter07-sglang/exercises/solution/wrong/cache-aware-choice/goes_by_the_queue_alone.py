"""Sends every prompt to the shortest queue."""

SAYS = "b misses 3 tokens"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, cached=[]) for w in workers], limit, page_size)
