"""Leaves the latency out of its count."""

SAYS = "3 blocks save 9, the latency is 9"


def fetch_plan(held, tokens, block_size, tiers, linear, quadratic):
    from dataclasses import replace

    from fetch_or_recompute import fetch_plan

    free = [replace(tier, latency=0) for tier in tiers]
    return fetch_plan(held, tokens, block_size, free, linear, quadratic)
