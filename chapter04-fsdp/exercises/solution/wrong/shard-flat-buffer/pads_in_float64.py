"""np.zeros without a dtype makes a buffer of float64 of whatever needs padding."""

SAYS = "its dtype is float64"


def shard(tensors, rank, ranks):
    import numpy as np
    from shard_flat_buffer import shard

    own = shard(tensors, rank, ranks)
    whole = sum(tensor.size for tensor in tensors)
    missing = min(len(own), max(0, (rank + 1) * len(own) - whole))
    return np.concatenate([own[: len(own) - missing], np.zeros(missing)]) if missing else own
