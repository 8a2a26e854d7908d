"""Checks the prefill engine alone."""

SAYS = "expected a ValueError"


def rank_map(layers, heads, source, target):
    from kv_transfer_plan import rank_map

    rank_map(layers, heads, source, source)
    try:
        return rank_map(layers, heads, source, target)
    except ValueError:
        return []
