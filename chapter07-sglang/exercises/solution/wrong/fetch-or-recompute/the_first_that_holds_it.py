"""Takes the first tier that is named, without comparing."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    first = [names[:1] for names in held]
    return fetch_plan(first, tokens, block_size, tiers, linear, quadratic)
