"""Task 1, uneven-shards: K workers, each with its own number of examples, and one gradient."""

import numpy as np


def combine_gradients(gradients: list[np.ndarray], counts: list[int]) -> np.ndarray:
    """The mean of the workers' gradients, each weighted by its examples; empty workers left out."""
    total = sum(counts)
    combined = np.zeros(np.shape(gradients[0]))
    for gradient, count in zip(gradients, counts, strict=True):
        if count:
            combined += count / total * np.asarray(gradient, dtype=np.float64)
    return combined


def gradient_scale(count: int, total: int, world_size: int) -> float:
    """`count / total` weighs the worker; `world_size` undoes DDP's division."""
    return world_size * count / total
