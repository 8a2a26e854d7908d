"""Pays the latency whenever the plan comes back to a tier."""

SAYS = "each tier's latency"


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import plan_time

    again = sum(
        next(tier.latency for tier in tiers if tier.name == name)
        for place, name in enumerate(plan)
        if place and plan[place - 1] != name and name in plan[:place]
    )
    return plan_time(plan, tokens, block_size, tiers, linear, quadratic) + again
