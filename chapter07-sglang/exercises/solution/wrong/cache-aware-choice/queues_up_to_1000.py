"""Takes queues of 1,000 tokens and more for equally long."""

SAYS = "queues of any length"


def choose(prompt, workers, limit, page_size):
    from dataclasses import replace

    from cache_aware_choice import choose

    capped = [replace(worker, queued=min(worker.queued, 1000)) for worker in workers]
    return choose(prompt, capped, limit, page_size)
