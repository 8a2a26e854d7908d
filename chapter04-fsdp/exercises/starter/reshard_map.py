"""Task 4, reshard-map: a checkpoint of K ranks, read by M."""

from collections.abc import Sequence

import numpy as np


def copies_to(
    target: int, size: int, sources: int, targets: int
) -> list[tuple[int, int, int, int]]:
    """What rank `target` of `targets` copies: (source rank, offset there, offset here, length).

    A buffer of `size` elements lay on `sources` ranks, in shards of ceil(size / sources) elements
    with padding behind the last element, and shall lie on `targets` ranks in the same manner. All
    numbers count elements. The copies stand in the order of their offsets; no padding is copied,
    none is empty, and two that could be one are one. A rank with nothing but padding has none.

    Each rank asks for itself, in jobs of a million ranks: that of others need not be computed.
    ValueError is raised for a negative size, fewer ranks than 1, and a target that is no rank.
    """
    raise NotImplementedError("reshard_map.copies_to is yours to write")


def reshard_map(size: int, sources: int, targets: int) -> list[tuple[int, int, int, int, int]]:
    """All copies: (source rank, offset there, target rank, offset there, length).

    In the order of the elements in the buffer, and as few as possible. ValueError as in
    `copies_to`.
    """
    raise NotImplementedError("reshard_map.reshard_map is yours to write")


def reshard(shards: Sequence[np.ndarray], size: int, targets: int) -> list[np.ndarray]:
    """The shards of `targets` ranks, from those of all source ranks, in the order of the ranks.

    Their padding is zeros, whatever stood in the old padding; bits and dtype stay. New and old
    shards share no memory, also where the number of ranks stays. ValueError is raised as in
    `copies_to`, and where the shards differ in dtype or one has not ceil(size / K) elements.
    """
    raise NotImplementedError("reshard_map.reshard is yours to write")
