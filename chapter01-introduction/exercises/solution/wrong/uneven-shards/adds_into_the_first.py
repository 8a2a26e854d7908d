"""Saves an array by adding up in the first worker's gradient."""

import numpy as np

SAYS = "changes the gradients or counts that it is given"


def combine_gradients(gradients, counts):
    total = np.asarray(gradients[0], np.float64)  # a copy only where the dtype is another
    total *= counts[0]
    for gradient, count in zip(gradients[1:], counts[1:], strict=True):
        total += count * np.asarray(gradient, np.float64)
    return total / sum(counts)
