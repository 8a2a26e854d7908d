"""Never opens more than three tiers."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from itertools import combinations

    from fetch_or_recompute import fetch_plan, plan_time

    cost = (block_size, tiers, linear, quadratic)
    plans = [
        fetch_plan(held, tokens, block_size, some, linear, quadratic)
        for some in combinations(tiers, min(3, len(tiers)))
    ]
    return min(plans, key=lambda plan: (plan_time(plan, tokens, *cost), len(plan)))
