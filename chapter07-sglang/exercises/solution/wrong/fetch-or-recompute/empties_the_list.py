"""Takes the blocks from the list that it was given."""

SAYS = "the arguments were changed"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    plan = fetch_plan(held, tokens, block_size, tiers, linear, quadratic)
    del held[: len(plan)]
    return plan
