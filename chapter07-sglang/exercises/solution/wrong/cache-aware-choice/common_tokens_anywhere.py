"""Counts the tokens that both have, wherever they stand."""

SAYS = "expected"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    seen = [
        replace(w, cached=[[t for t in prompt if t in sequence] for sequence in w.cached])
        for w in workers
    ]
    seen = [replace(w, cached=[list(prompt[: len(s)]) for s in w.cached]) for w in seen]
    return choose(prompt, seen, limit, page_size)
