"""Task 2, column-parallel: a two-layer MLP on K workers, each with a K-th of its hidden columns.

One worker computes y = relu(x @ up) @ down, with x [tokens, hidden], up [hidden, inner] and
down [inner, hidden]. On K workers `up` is cut by columns and `down` by rows, so that relu, which
works on each column alone, needs nothing from the others (Shoeybi et al., arXiv 1909.08053,
section 3). The derivative of relu at 0 is 0. All arrays have one dtype, float64 or float32, and so
have all results and all that is communicated. No array that is handed in is changed.
"""

from collections.abc import Callable

import numpy as np


def split_weights(
    up: np.ndarray, down: np.ndarray, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The shards of `rank`: up [hidden, inner / K] and down [inner / K, hidden].

    Rank 0 has the first inner / K columns and rows in their order, rank 1 the next ones, and so on.
    Raises ValueError, with both numbers in its message, where world_size does not divide inner.
    """
    raise NotImplementedError("column_parallel.split_weights is yours to write")


class ParallelMLP:
    """One worker's part. `all_reduce(array)` returns the sum of all workers' arrays, on each."""

    def __init__(
        self,
        up_shard: np.ndarray,
        down_shard: np.ndarray,
        all_reduce: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        raise NotImplementedError("column_parallel.ParallelMLP is yours to write")

    def forward(self, x: np.ndarray) -> np.ndarray:
        """y [tokens, hidden], the same on every worker, from x, the same on every worker.

        Communicates once, an array as large as y.
        """
        raise NotImplementedError("column_parallel.ParallelMLP.forward is yours to write")

    def backward(self, grad_y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From dL/dy, the same on every worker: dL/dx, whole, and this worker's shards of dL/dup
        and dL/ddown, for the last forward pass alone: nothing is added to earlier gradients.
        Communicates once, an array as large as dL/dx.
        """
        raise NotImplementedError("column_parallel.ParallelMLP.backward is yours to write")
