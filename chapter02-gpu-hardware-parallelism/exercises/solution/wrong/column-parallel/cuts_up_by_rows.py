"""Cuts the first matrix by rows, so that relu would need the other workers' sums."""

SAYS = "shards of shapes"


def split_weights(up, down, rank, world_size):
    import numpy as np

    return np.array_split(up, world_size, axis=0)[rank], np.array_split(down, world_size)[rank]
