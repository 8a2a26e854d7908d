"""Task 1, shard-flat-buffer: the tensors of a unit as one buffer, of which each rank has a part."""

from collections.abc import Sequence

import numpy as np


def shard(tensors: Sequence[np.ndarray], rank: int, ranks: int) -> np.ndarray:
    """This rank's shard of a unit, [ceil(n / ranks)], n the elements of all its tensors together.

    The elements of all tensors, each in row-major order whatever its memory's order is, stand one
    after another; each rank has as many of them as every other, and where the last ones have fewer
    left, or none, zeros fill the shard up. Its dtype is the tensors'. A tensor may be empty; where
    all are, so are the shards.

    The shard shares no memory with the tensors, which are not changed. ValueError is raised where
    `rank` is not one of `ranks`, where there is no tensor, where two differ in dtype, and for a
    scalar, a tensor without a dimension, which torch's fully_shard refuses too.
    """
    raise NotImplementedError("shard_flat_buffer.shard is yours to write")


def unshard(shards: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The tensors of these shapes, from the shards of all ranks in the order of the ranks.

    Bit by bit what `shard` was given, whatever stands in the padding. The caller may write to each
    tensor: neither the shards nor another tensor changes then. ValueError is raised where the
    shards differ in length or dtype, or are not as long as shards of these shapes are.
    """
    raise NotImplementedError("shard_flat_buffer.unshard is yours to write")


def pieces(shapes: Sequence[tuple[int, ...]], rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """What this rank's shard has of which tensor: (number of the tensor, start, stop).

    start and stop count the tensor's elements in row-major order. The pieces stand as they do in
    the shard; none is empty, so a rank may have none at all. ValueError as in `shard` for the rank.
    """
    raise NotImplementedError("shard_flat_buffer.pieces is yours to write")
