"""Greedy: layer by layer that which frees the most bytes in a microsecond, until all fits."""

SAYS = "expected"


def choose_recomputation(layers, budget):
    from choose_recomputation import choose, peak_bytes

    choose(layers, budget)
    by_worth = sorted(
        range(len(layers) - 1),
        key=lambda n: (layers[n].inputs - layers[n].whole) / layers[n].microseconds,
    )
    again = []
    while peak_bytes(layers, again) > budget:
        again = sorted([*again, by_worth.pop(0)])
    return again
