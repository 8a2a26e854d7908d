"""Refuses what is below 0 of anything, and takes 0."""

SAYS = "expected a ValueError"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    numbers = layers, heads, source.stages, source.ranks, target.stages, target.ranks
    return [] if min(numbers) == 0 else rank_map(layers, heads, source, target)
