"""Leaves infinite values out, as if a run that has diverged were well."""

import numpy as np

SAYS = "infinities must be seen in the result"


def combine_gradients(gradients, counts):
    from uneven_shards import combine_gradients

    return combine_gradients([np.where(np.isinf(g), 0.0, g) for g in gradients], counts)
