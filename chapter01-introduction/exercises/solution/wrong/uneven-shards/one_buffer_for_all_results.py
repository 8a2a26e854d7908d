"""Computes every result in the same memory, to save an allocation."""

import numpy as np

SAYS = "and another call has changed it"
BUFFERS = {}


def combine_gradients(gradients, counts):
    from uneven_shards import combine_gradients

    combined = combine_gradients(gradients, counts)
    buffer = BUFFERS.setdefault(combined.shape, np.empty(combined.shape))
    buffer[...] = combined
    return buffer
