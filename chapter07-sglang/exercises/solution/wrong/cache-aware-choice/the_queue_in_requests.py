"""Adds requests to tokens."""

SAYS = "b"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, queued=w.requests) for w in workers], limit, page_size)
