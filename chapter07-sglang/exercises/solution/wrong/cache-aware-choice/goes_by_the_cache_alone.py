"""Sends every prompt to the longest match, however long its queue is."""

SAYS = "expected b, got a"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, queued=0) for w in workers], limit, page_size)
