"""Task 1, uneven-shards: K workers, each with its own number of examples, and one gradient."""

import numpy as np


def combine_gradients(gradients: list[np.ndarray], counts: list[int]) -> np.ndarray:
    """The gradient of the mean loss over all examples of all workers.

    gradients: one array per worker, all of one shape (a scalar's too) and one dtype (float64,
        float32 or float16): the gradient of the mean loss over that worker's own examples. A worker
        without examples has nothing to average: its array may hold anything, NaN and infinity too.
    counts: how many examples each worker has; at least one worker has some.
    Returns a new array of the gradients' shape, float64 and added up in float64 whatever their
    dtype, which the caller may change: it is no argument, nor changed by a later call. No argument
    is changed. Where a worker with examples has a NaN or an infinity, the result is not finite
    either: a run that has diverged must not look well.
    """
    raise NotImplementedError("uneven_shards.combine_gradients is yours to write")


def gradient_scale(count: int, total: int, world_size: int) -> float:
    """The factor by which a worker multiplies its own mean gradient before DDP's all-reduce.

    DDP sums the workers' gradients and divides by `world_size`; it knows no counts. With this
    factor, what comes out is the gradient of the mean loss over all `total` examples.

    count: this worker's examples, 0 or more; total: those of all workers, at least 1.
    """
    raise NotImplementedError("uneven_shards.gradient_scale is yours to write")
