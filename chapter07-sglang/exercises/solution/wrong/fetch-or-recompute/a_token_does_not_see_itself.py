"""Counts p pairs for the token at place p."""

SAYS = "ns for the plan"


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import plan_time

    return plan_time(plan, tokens, block_size, tiers, linear - quadratic, quadratic)
