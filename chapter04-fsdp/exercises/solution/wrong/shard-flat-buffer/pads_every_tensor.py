"""Pads every tensor by itself, as if each were a buffer of its own."""

SAYS = "expected"


def shard(tensors, rank, ranks):
    import numpy as np
    from shard_flat_buffer import shard

    shard(tensors, rank, ranks)
    return np.concatenate([shard([tensor], rank, ranks) for tensor in tensors])
