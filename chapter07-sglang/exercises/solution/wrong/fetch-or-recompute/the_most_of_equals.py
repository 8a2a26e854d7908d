"""Of plans that take equally long it fetches the most."""

SAYS = "which takes as long"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan, plan_time

    plan = fetch_plan(held, tokens, block_size, tiers, linear, quadratic)
    cost = (tokens, block_size, tiers, linear, quadratic)
    for names in held[len(plan) : (tokens - 1) // block_size]:
        same = [n for n in names if plan_time([*plan, n], *cost) == plan_time(plan, *cost)]
        if not same:
            break
        plan = [*plan, same[0]]
    return plan
