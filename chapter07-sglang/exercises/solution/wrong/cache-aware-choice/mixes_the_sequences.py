"""Takes each page from any sequence that has it at its place."""

SAYS = "of one sequence"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    def mixed(worker):
        pages = {}
        for sequence in worker.cached:
            for at in range(0, len(sequence), page_size):
                pages.setdefault(at, []).append(sequence[at : at + page_size])
        at = 0
        while prompt[at : at + page_size] in pages.get(at, []):
            at += page_size
        return [*worker.cached, prompt[:at]]

    seen = [replace(worker, cached=mixed(worker)) for worker in workers]
    return choose(prompt, seen, limit, page_size)
