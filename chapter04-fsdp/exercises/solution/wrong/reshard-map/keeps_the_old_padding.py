"""np.concatenate and cut: the old padding becomes the new one."""

SAYS = "the shard of rank"


def reshard(shards, size, targets):
    import numpy as np
    from reshard_map import part, reshard

    reshard(shards, size, targets)
    want = part(size, targets)
    whole = np.concatenate(shards)
    whole = np.append(whole, np.zeros(max(0, want * targets - len(whole)), whole.dtype))
    return [whole[rank * want :][:want].copy() for rank in range(targets)]
