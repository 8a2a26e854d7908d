"""Task 3, cache-aware-choice: the reference solution."""

from itertools import takewhile


def choose(prompt, workers, limit, page_size):
    def missed(worker):
        usable = prompt[:-1]  # the last token is always computed
        matched = max((common(usable, sequence) for sequence in worker.cached), default=0)
        return len(prompt) - matched // page_size * page_size

    def rank(worker):
        return worker.queued + missed(worker), worker.requests, worker.last

    free = [worker for worker in workers if worker.requests < limit]
    return min(free, key=rank).name if free else None


def common(one, other):
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
