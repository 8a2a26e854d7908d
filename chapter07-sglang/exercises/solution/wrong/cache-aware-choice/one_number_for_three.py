"""Makes one number of cost, requests and turn, which run into each other."""

SAYS = "expected"


def choose(prompt, workers, limit, page_size):
    from cache_aware_choice import common

    def rank(worker):
        matched = max((common(prompt[:-1], sequence) for sequence in worker.cached), default=0)
        cost = worker.queued + len(prompt) - matched // page_size * page_size
        return cost * 10**4 + worker.requests * 100 + worker.last

    free = [worker for worker in workers if worker.requests < limit]
    return min(free, key=rank).name if free else None
