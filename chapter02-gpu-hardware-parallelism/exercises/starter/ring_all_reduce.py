"""Task 1, ring-all-reduce: the sum of every worker's buffer, on every worker."""

from collections.abc import Callable

import numpy as np


def ring_all_reduce(
    buffer: np.ndarray,
    rank: int,
    world_size: int,
    send: Callable[[int, np.ndarray], None],
    receive: Callable[[int], np.ndarray],
) -> None:
    """Replace `buffer` [n], in place, by the element-wise sum over all workers' buffers.

    Every worker calls this at once, with its own `rank` from 0 to world_size - 1, and may call it
    again. The buffer's dtype (float64, float32, float16, int64 or int32) is that of the sum and of
    all that is sent. A single worker sends nothing.

    send(to, array): sends a copy of `array` to the worker `to`; returns at once.
    receive(source): waits for the next array that `source` sent to this worker, and returns it.

    The workers stand in a ring: send to (rank + 1) % world_size only, receive from the one before
    only. Cut the buffer into world_size chunks whose sizes differ by at most one; n may be smaller
    than world_size, and 0. In world_size - 1 steps the sums of the chunks are collected (a
    reduce-scatter), in as many steps they are handed round (an all-gather). In each step every
    worker sends one chunk, the same amount as the others up to an element, and receives one.
    Together the workers send 2 * (world_size - 1) * n elements, and no more; all that is sent is
    received.
    """
    raise NotImplementedError("ring_all_reduce.ring_all_reduce is yours to write")
