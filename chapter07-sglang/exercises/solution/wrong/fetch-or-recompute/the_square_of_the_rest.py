"""Squares the tokens that are computed, as if none stood before them."""

SAYS = "ns for the plan"


def plan_time(plan, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import plan_time

    left = tokens - len(plan) * block_size
    return plan_time([], left, block_size, tiers, linear, quadratic) + plan_time(
        plan, len(plan) * block_size, block_size, tiers, 0, 0
    )
