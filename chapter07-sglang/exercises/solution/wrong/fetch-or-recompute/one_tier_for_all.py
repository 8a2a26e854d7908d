"""Takes all blocks from one tier."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan, plan_time

    cost = (tokens, block_size, tiers, linear, quadratic)
    plans = [fetch_plan(held, tokens, block_size, [t], linear, quadratic) for t in tiers]
    return min([[], *plans], key=lambda plan: (plan_time(plan, *cost), len(plan)))
