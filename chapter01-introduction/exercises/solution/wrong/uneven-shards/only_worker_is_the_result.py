"""Hands the only worker's own array back, which the caller then changes."""

SAYS = "the caller doubles the result, and a worker's gradient has changed"


def combine_gradients(gradients, counts):
    import numpy as np
    from uneven_shards import combine_gradients

    if len(gradients) == 1:
        return np.asarray(gradients[0], dtype=np.float64)
    return combine_gradients(gradients, counts)
