"""Falls back on the last token, possible or not, where rounding leaves a gap."""

SAYS = "the last token of a probability above 0"


def draw(probabilities, uniform):
    import numpy as np

    possible = np.flatnonzero(probabilities)
    place = np.searchsorted(np.cumsum(probabilities[possible]), uniform, side="right")
    return int(possible[place]) if place < len(possible) else len(probabilities) - 1
