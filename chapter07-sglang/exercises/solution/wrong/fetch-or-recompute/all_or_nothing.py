"""Fetches all that can be, or nothing."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):

    from fetch_or_recompute import plan_time

    cost, plan = (tokens, block_size, tiers, linear, quadratic), []
    for names in held[: (tokens - 1) // block_size]:
        if not names:
            break
        plan.append(min(names, key=lambda name: plan_time([*plan, name], *cost)))
    return plan if plan_time(plan, *cost) < plan_time([], *cost) else []
