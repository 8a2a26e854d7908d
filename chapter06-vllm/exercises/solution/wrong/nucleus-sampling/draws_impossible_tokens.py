"""Draws the first token at 0, whatever its probability."""

SAYS = "uniform 0.0: expected token 1"


def draw(probabilities, uniform):
    import numpy as np

    return int(np.searchsorted(np.cumsum(probabilities), uniform, side="left"))
