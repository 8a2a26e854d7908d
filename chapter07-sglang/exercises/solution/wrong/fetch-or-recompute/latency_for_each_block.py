"""Pays the latency for each block."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from dataclasses import replace

    from fetch_or_recompute import fetch_plan

    each = [replace(t, latency=0, block_time=t.block_time + t.latency) for t in tiers]
    return fetch_plan(held, tokens, block_size, each, linear, quadratic)
