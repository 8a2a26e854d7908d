"""Of equals it looks at turns, and then at requests."""

SAYS = "requests come before turns"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    free = [replace(w, requests=w.last, last=w.requests) for w in workers if w.requests < limit]
    return choose(prompt, free, 10**9, page_size)
