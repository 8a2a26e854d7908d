"""Takes tiers that are equally fast for one, and pays one latency."""

SAYS = "two latencies"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from fetch_or_recompute import fetch_plan

    first = {}
    for tier in tiers:
        first.setdefault((tier.latency, tier.block_time), tier)
    name = {tier.name: first[tier.latency, tier.block_time].name for tier in tiers}
    merged = [[name[each] for each in names] for names in held]
    plan = fetch_plan(merged, tokens, block_size, list(first.values()), linear, quadratic)
    return [
        each if each in names else next(other for other in names if name[other] == each)
        for each, names in zip(plan, held, strict=False)
    ]
