"""Hands the old shards back where the number of ranks stays."""

SAYS = "shares memory"


def reshard(shards, size, targets):
    import numpy as np
    from reshard_map import reshard

    found = reshard(shards, size, targets)
    same = len(shards) == targets and all(map(np.array_equal, found, shards))
    return list(shards) if same else found
