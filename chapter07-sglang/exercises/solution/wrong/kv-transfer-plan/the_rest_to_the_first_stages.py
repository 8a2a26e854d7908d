"""Gives the layers that are left over to the first stages."""

SAYS = "layers"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    made = rank_map(layers, heads, source, target)

    def swapped(copy):
        giver, taker, first, many, *rest = copy
        return giver, taker, layers - first - many, many, *rest

    def turned(rank, layout):
        return rank + (layout.stages - 1 - 2 * (rank // layout.ranks)) * layout.ranks

    return sorted(
        (turned(copy[0], source), turned(copy[1], target), *swapped(copy)[2:]) for copy in made
    )
