"""Takes each block from its fastest tier, whatever that tier's latency."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):

    from fetch_or_recompute import plan_time

    cost, plan = (tokens, block_size, tiers, linear, quadratic), []
    times = {tier.name: tier.block_time for tier in tiers}
    plans = [[]]
    for names in held[: (tokens - 1) // block_size]:
        if not names:
            break
        plan = [*plan, min(names, key=times.get)]
        plans.append(plan)
    return min(plans, key=lambda one: plan_time(one, *cost))
