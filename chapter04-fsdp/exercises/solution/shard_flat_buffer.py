"""Task 1, shard-flat-buffer: the reference solution."""

import math

import numpy as np


def shard(tensors, rank, ranks):
    size = shard_size([tensor.shape for tensor in tensors], rank, ranks)
    if len({tensor.dtype for tensor in tensors}) != 1:
        raise ValueError("a buffer has one dtype, that of all its tensors")
    if any(tensor.ndim == 0 for tensor in tensors):
        raise ValueError("a scalar cannot be sharded; give it a dimension")
    whole = np.concatenate([tensor.ravel() for tensor in tensors])
    own = whole[rank * size : (rank + 1) * size]
    return np.concatenate([own, np.zeros(size - len(own), dtype=own.dtype)])


def unshard(shards, shapes):
    size = shard_size(shapes, 0, len(shards))
    if len({part.dtype for part in shards}) != 1:
        raise ValueError("shards of one buffer have one dtype")
    if any(part.shape != (size,) for part in shards):
        raise ValueError(f"shards of {shapes} have {size} elements each")
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.concatenate(shards), ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=False)]


def pieces(shapes, rank, ranks):
    size = shard_size(shapes, rank, ranks)
    found, begin = [], 0
    for number, shape in enumerate(shapes):
        start = max(0, rank * size - begin)
        stop = min(math.prod(shape), (rank + 1) * size - begin)
        if start < stop:
            found.append((number, start, stop))
        begin += math.prod(shape)
    return found


def shard_size(shapes, rank, ranks):
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is none of {ranks}")
    return -(-sum(map(math.prod, shapes)) // ranks)
