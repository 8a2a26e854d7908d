"""Sorts by the rank that receives."""

SAYS = "expected the pairs"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    return sorted(rank_map(layers, heads, source, target), key=lambda copy: copy[1])
