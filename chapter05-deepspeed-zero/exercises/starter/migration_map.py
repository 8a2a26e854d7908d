"""Task 4, migration-map: a checkpoint of ZeRO's stage 2, read by a job in stage 3.

In stage 2 all parameters lie side by side in one buffer, of which rank r of K has part r, ceil(n /
K) elements. In stage 3 each parameter is cut alone: rank r of M has part r of each of them,
ceil(size / M) elements of one of `size`. Padding stands behind the last element, wherever one cuts.
"""

from collections.abc import Sequence

import numpy as np


def copies_to(
    target: int, sizes: Sequence[int], sources: int, targets: int
) -> list[tuple[int, int, int, int, int]]:
    """What rank `target` of `targets` copies: (source rank, begin, end, parameter, there).

    Elements begin to end of the source rank's partition in stage 2 go to `there` and behind it in
    the target's part of the parameter, by its number in `sizes`. The copies stand in the order of
    the parameters, then of the elements; no padding is copied, none is empty, and what lies in one
    source and belongs to one parameter is one copy.

    Each rank asks for itself, in jobs of a million ranks: what others need is not to be computed.
    ValueError is raised for a negative size, fewer ranks than 1, and a target that is no rank.
    """
    raise NotImplementedError("migration_map.copies_to is yours to write")


def migrate(
    partitions: Sequence[np.ndarray], sizes: Sequence[int], targets: int
) -> list[list[np.ndarray]]:
    """What each of the `targets` ranks has in stage 3, a part of each parameter, from stage 2's.

    `partitions` are those of all source ranks. Bits and dtype stay. The padding is zeros, whatever
    stood in the old one; all arrays have their own memory, which can be written to. ValueError is
    raised as in `copies_to`, where two partitions differ in dtype, and where one has not the shape
    that it must have.
    """
    raise NotImplementedError("migration_map.migrate is yours to write")
