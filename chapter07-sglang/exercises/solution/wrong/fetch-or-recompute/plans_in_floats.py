"""Compares times as floats, of which large ones are alike."""

SAYS = "expected a plan of"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from dataclasses import replace

    from fetch_or_recompute import fetch_plan

    floats = [replace(t, latency=float(t.latency), block_time=float(t.block_time)) for t in tiers]
    return fetch_plan(held, tokens, block_size, floats, float(linear), float(quadratic))
