"""Task 5, fetch-or-recompute: the reference solution."""

from itertools import combinations


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    used = [tier for tier in tiers if tier.name in plan]
    fetched = sum(tier.latency + tier.block_time * plan.count(tier.name) for tier in used)
    return fetched + compute_time(len(plan) * block_size, tokens, linear, quadratic)


def compute_time(start, tokens, linear, quadratic):
    pairs = tokens * (tokens + 1) // 2 - start * (start + 1) // 2
    return linear * (tokens - start) + quadratic * pairs


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    best = (compute_time(0, tokens, linear, quadratic), 0)
    plan = []
    for size in range(1, len(tiers) + 1):
        for open_tiers in combinations(tiers, size):
            # Each block comes from the fastest of these; what is left is when to stop.
            fetched, names = sum(tier.latency for tier in open_tiers), []
            for holders in held[: (tokens - 1) // block_size]:
                here = [tier for tier in open_tiers if tier.name in holders]
                if not here:
                    break
                tier = min(here, key=lambda tier: tier.block_time)
                fetched += tier.block_time
                names.append(tier.name)
                start = len(names) * block_size
                time = fetched + compute_time(start, tokens, linear, quadratic)
                if (time, len(names)) < best:
                    best, plan = (time, len(names)), names[:]
    return plan
