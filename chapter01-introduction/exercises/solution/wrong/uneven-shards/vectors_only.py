"""Weighs with a matrix product, which adds up another axis where gradients are matrices."""

import numpy as np

SAYS = "ValueError"


def combine_gradients(gradients, counts):
    used = [(np.asarray(g, float), c) for g, c in zip(gradients, counts, strict=True) if c]
    return np.array([c for _, c in used]) / sum(counts) @ np.array([g for g, _ in used])
