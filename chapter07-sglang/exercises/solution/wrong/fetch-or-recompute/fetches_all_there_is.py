"""Fetches whatever is held, for computing is work."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):

    plan = []
    for names in held[: (tokens - 1) // block_size]:
        here = [tier for tier in tiers if tier.name in names]
        if not here:
            break
        plan.append(min(here, key=lambda tier: tier.block_time).name)
    return plan
