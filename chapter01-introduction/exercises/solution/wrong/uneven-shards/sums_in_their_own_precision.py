"""Adds up in the gradients' dtype, and converts the sum only at the end."""

import numpy as np

SAYS = "expected the one-machine gradient"


def combine_gradients(gradients, counts):
    pairs = zip(gradients, counts, strict=True)
    return np.asarray(sum(g * (c / sum(counts)) for g, c in pairs if c), np.float64)
