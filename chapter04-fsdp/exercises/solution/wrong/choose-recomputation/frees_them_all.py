"""Recomputes everything as soon as not everything fits."""

SAYS = "expected"


def choose_recomputation(layers, budget):
    from choose_recomputation import choose, peak_bytes

    choose(layers, budget)
    return list(range(len(layers))) if peak_bytes(layers, ()) > budget else []
