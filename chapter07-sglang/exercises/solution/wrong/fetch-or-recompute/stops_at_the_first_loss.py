"""Stops at the first block that is faster to compute than to fetch."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):

    from fetch_or_recompute import plan_time

    cost, plan = (tokens, block_size, tiers, linear, quadratic), []
    for names in held[: (tokens - 1) // block_size]:
        longer = [plan + [name] for name in names]
        best = min(longer, key=lambda one: plan_time(one, *cost), default=plan)
        if plan_time(best, *cost) >= plan_time(plan, *cost):
            break
        plan = best
    return plan
