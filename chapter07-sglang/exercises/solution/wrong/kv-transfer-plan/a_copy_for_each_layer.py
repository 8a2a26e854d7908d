"""Sends layer by layer and says so."""

SAYS = "expected the pairs"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    return [
        (giver, taker, layer, 1, *rest)
        for giver, taker, first, many, *rest in rank_map(layers, heads, source, target)
        for layer in range(first, first + many)
    ]
