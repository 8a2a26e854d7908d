"""Adds the latency of tiers that are not used."""

SAYS = "ns for the plan"


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import plan_time

    unused = sum(tier.latency for tier in tiers if tier.name not in plan)
    return plan_time(plan, tokens, block_size, tiers, linear, quadratic) + unused
