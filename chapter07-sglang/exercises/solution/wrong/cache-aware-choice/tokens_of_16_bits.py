"""Keeps tokens in 16 bits, as if vocabularies were that small."""

SAYS = "expected b, got a"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    def small(tokens):
        return [token % 2**16 for token in tokens]

    seen = [replace(w, cached=list(map(small, w.cached))) for w in workers]
    return choose(small(prompt), seen, limit, page_size)
