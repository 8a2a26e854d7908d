"""np.array_split: the ranks' shards differ by one element, which no all-gather takes."""

SAYS = "its shape is"


def shard(tensors, rank, ranks):
    import numpy as np
    from shard_flat_buffer import shard

    shard(tensors, rank, ranks)
    whole = np.concatenate([tensor.ravel() for tensor in tensors])
    return np.array_split(whole, ranks)[rank].copy()
