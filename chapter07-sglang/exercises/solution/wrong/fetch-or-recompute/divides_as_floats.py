"""Divides the pairs by two as floats."""

SAYS = "ns for the plan"


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import plan_time

    start = len(plan) * block_size
    pairs = (tokens * (tokens + 1) - start * (start + 1)) / 2
    return plan_time(plan, tokens, block_size, tiers, linear, 0) + int(quadratic * pairs)
