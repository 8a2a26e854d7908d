"""Recomputes all where nothing fits, and says nothing."""

SAYS = "nothing fits; expected a ValueError"


def choose_recomputation(layers, budget):
    from choose_recomputation import choose

    try:
        return choose(layers, budget)
    except ValueError:
        return list(range(len(layers)))
