"""Compares the first shard's length with the last one's only."""

SAYS = "a shard of 2 elements between two of 3"


def reshard(shards, size, targets):
    import numpy as np
    from reshard_map import reshard

    if len({shard.dtype for shard in shards}) == 1 and shards[0].shape == shards[-1].shape:
        shards = [np.resize(shard, shards[0].shape) for shard in shards]
    return reshard(shards, size, targets)
