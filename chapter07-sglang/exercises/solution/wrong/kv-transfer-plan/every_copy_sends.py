"""Lets every rank that has a head send it."""

SAYS = "expected the pairs"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    made = rank_map(layers, heads, source, target)
    copies = max(1, source.ranks // heads)
    found = []
    for giver, *rest in made:
        first = giver - giver % source.ranks % copies
        found += [(first + copy, *rest) for copy in range(copies)]
    return sorted(found)
