"""Counts the linear part of computing alone."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    return fetch_plan(held, tokens, block_size, tiers, linear, 0)
