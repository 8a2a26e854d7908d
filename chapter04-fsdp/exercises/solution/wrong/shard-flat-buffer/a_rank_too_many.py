"""Rank K of K gets the padding that is left, instead of an error."""

SAYS = "expected a ValueError"


def shard(tensors, rank, ranks):
    import numpy as np
    from shard_flat_buffer import shard

    if rank == ranks > 0:
        return np.zeros_like(shard(tensors, 0, ranks))
    return shard(tensors, rank, ranks)
