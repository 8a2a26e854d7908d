"""Chooses the first of equals, always."""

SAYS = "fewer requests"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    return choose(prompt, [replace(w, requests=0, last=-1) for w in workers if w.requests < limit],
                  limit, page_size)  # fmt: skip
