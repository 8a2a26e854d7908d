"""Fetches a head that several ranks have from the first of them, always."""

SAYS = "the copies share the work"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    made = rank_map(layers, heads, source, target)
    copies = max(1, source.ranks // heads)
    first = [(copy[0] - copy[0] % source.ranks % copies, *copy[1:]) for copy in made]
    return sorted(first)
