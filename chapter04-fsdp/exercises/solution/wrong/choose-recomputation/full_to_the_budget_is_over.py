"""A peak of exactly the budget does not fit."""

SAYS = "all fits"


def choose_recomputation(layers, budget):
    from choose_recomputation import choose

    return choose(layers, budget - 1)
