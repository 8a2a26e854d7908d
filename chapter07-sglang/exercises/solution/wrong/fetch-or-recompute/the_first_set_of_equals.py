"""Of sets of tiers that take equally long it keeps the first, however many blocks it fetches."""

SAYS = "which takes as long"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from itertools import combinations

    from fetch_or_recompute import fetch_plan, plan_time

    cost = (tokens, block_size, tiers, linear, quadratic)
    sets = [some for n in range(len(tiers) + 1) for some in combinations(tiers, n)]
    plans = [fetch_plan(held, tokens, block_size, some, linear, quadratic) for some in sets]
    return min(plans[1:] + plans[:1], key=lambda plan: (plan_time(plan, *cost), plan != []))
