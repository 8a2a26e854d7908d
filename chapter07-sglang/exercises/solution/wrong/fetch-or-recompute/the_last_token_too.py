"""Fetches a prompt whole, and has no logits to go on with."""

SAYS = "but the last token is computed"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    return fetch_plan(held, tokens + 1, block_size, tiers, linear, quadratic)
