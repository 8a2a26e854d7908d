"""Gathers into a float64 buffer: large integers and the bits of a nan do not survive it."""

SAYS = "came back with other bits"


def unshard(shards, shapes):
    import numpy as np
    from shard_flat_buffer import unshard

    unshard(shards, shapes)
    with np.errstate(invalid="ignore"):
        floats = unshard([part.astype(np.float64) for part in shards], shapes)
        return [tensor.astype(shards[0].dtype) for tensor in floats]
