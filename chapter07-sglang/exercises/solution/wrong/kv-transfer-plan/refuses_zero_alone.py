"""Refuses 0 of anything, and takes what is below it."""

SAYS = "expected a ValueError"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    numbers = layers, heads, source.stages, source.ranks, target.stages, target.ranks
    if 0 not in numbers and min(numbers) < 0:
        return []
    return rank_map(layers, heads, source, target)
