"""Goes through backward in forward's order."""

SAYS = "expected a peak of"


def peak_bytes(layers, again):
    from choose_recomputation import peak_bytes

    last = len(layers) - 1
    return peak_bytes(layers[::-1], {last - number for number in again})
