"""Gives what is left at the end to the last tensor, where its shape leaves it open: -1."""

SAYS = "came back as"


def unshard(shards, shapes):
    import math

    import numpy as np
    from shard_flat_buffer import unshard

    *found, last = unshard(shards, shapes)
    begin = sum(map(math.prod, shapes[:-1]))
    rest = shapes[-1][1:]
    if math.prod(rest) and (len(np.concatenate(shards)) - begin) % math.prod(rest) == 0:
        last = np.concatenate(shards)[begin:].reshape(-1, *rest)
    return [*found, last]
