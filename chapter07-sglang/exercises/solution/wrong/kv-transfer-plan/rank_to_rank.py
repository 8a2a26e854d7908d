"""Sends from each rank to the one of the same number, as if both sides were alike."""

SAYS = "expected the pairs"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    return [copy for copy in rank_map(layers, heads, source, target) if copy[0] == copy[1]]
