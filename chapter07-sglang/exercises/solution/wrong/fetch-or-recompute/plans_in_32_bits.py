"""Counts nanoseconds in 32 bits, in which 2.1 s have room."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from dataclasses import replace

    import fetch_or_recompute as solution

    def wrapped(number):
        return (number + 2**31) % 2**32 - 2**31

    whole = solution.compute_time
    solution.compute_time = lambda *arguments: wrapped(whole(*arguments))
    small = [replace(tier, latency=wrapped(tier.latency)) for tier in tiers]
    plan = solution.fetch_plan(held, tokens, block_size, small, linear, quadratic)
    solution.compute_time = whole
    return plan
