"""A worker without examples gets the weight 0, but 0 times NaN is NaN."""

import numpy as np

SAYS = "shards of [0, 20, 4] examples"


def combine_gradients(gradients, counts):
    return np.average(gradients, axis=0, weights=counts)
