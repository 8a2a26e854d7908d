"""Goes on behind a block that nobody holds."""

SAYS = "which does not hold it"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    some = [names or held[0] for names in held]
    return fetch_plan(some, tokens, block_size, tiers, linear, quadratic)
