"""Task 2, scheduler-step: the reference solution."""

from types import SimpleNamespace


def schedule(waiting, running, free_blocks, block_size, token_budget):
    step = SimpleNamespace(chunks=[], preempted=[])
    left = sorted(running, key=lambda request: request.arrival)

    def take(request, count):
        nonlocal free_blocks, token_budget
        free_blocks -= missing(request, count)
        token_budget -= count
        step.chunks.append((request.name, count))

    def missing(request, count):
        return max(0, -(-(request.computed + count) // block_size) - request.blocks)

    place = 0
    while place < len(left) and token_budget:
        request = left[place]
        count = min(request.tokens - request.computed, token_budget)
        if missing(request, count) <= free_blocks:
            take(request, count)
            place += 1
        else:
            victim = left.pop()
            step.preempted.append(victim.name)
            free_blocks += victim.blocks
    if not step.preempted:
        for request in sorted(waiting, key=lambda request: request.arrival):
            count = min(request.tokens, token_budget)
            if not count or missing(request, count) > free_blocks:
                break
            take(request, count)
    return step
