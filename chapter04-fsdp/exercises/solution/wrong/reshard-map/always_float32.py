"""New shards are float32, as weights are."""

SAYS = "float32, not"


def reshard(shards, size, targets):
    import numpy as np
    from reshard_map import reshard

    with np.errstate(all="ignore"):
        return [shard.astype(np.float32) for shard in reshard(shards, size, targets)]
