"""Counts heads in the model instead of in the rank."""

SAYS = "expected the copy"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    copies = []
    for giver, taker, first, many, own, there, width in rank_map(layers, heads, source, target):
        own += giver % source.ranks * heads // source.ranks
        there += taker % target.ranks * heads // target.ranks
        copies.append((giver, taker, first, many, own, there, width))
    return copies
