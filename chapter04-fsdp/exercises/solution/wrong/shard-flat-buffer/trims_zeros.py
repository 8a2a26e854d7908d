"""Tells the padding by its zeros, so that a tensor that ends in zeros loses them."""

SAYS = "came back"


def unshard(shards, shapes):
    import math

    import numpy as np
    from shard_flat_buffer import unshard

    unshard(shards, shapes)
    whole = np.trim_zeros(np.concatenate(shards), "b")
    needed = sum(map(math.prod, shapes))
    whole = np.append(whole, np.ones(max(0, needed - len(whole)), whole.dtype))
    return unshard([whole[:needed]], shapes)
