"""Fills what must be freed of the sum, as if all layers were there at once."""

SAYS = "expected"


def choose_recomputation(layers, budget):
    from itertools import product

    from choose_recomputation import choose

    choose(layers, budget)
    missing = sum(one.whole for one in layers) - budget
    fits = []
    for flags in product([False, True], repeat=len(layers)):
        freed = sum((one.whole - one.inputs) * f for one, f in zip(layers, flags, strict=True))
        time = sum(one.microseconds * f for one, f in zip(layers, flags, strict=True))
        if freed >= missing:
            fits.append((time, -freed, flags))
    if not fits:
        return []
    return [number for number, flag in enumerate(min(fits)[2]) if flag]
