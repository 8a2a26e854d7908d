"""Compares tokens as text, in which 1, 11 is 11, 1."""

SAYS = "1, 11 is not 11, 1"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    def seen(sequence):
        count = min(len(prompt), len(sequence))
        while "".join(map(str, prompt[:count])) != "".join(map(str, sequence[:count])):
            count -= 1
        return prompt[:count]

    workers = [replace(w, cached=list(map(seen, w.cached))) for w in workers]
    return choose(prompt, workers, limit, page_size)
