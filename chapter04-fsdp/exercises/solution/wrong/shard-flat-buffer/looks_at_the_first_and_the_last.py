"""Compares the first tensor's dtype with the last one's only."""

SAYS = "float64 between two of float32"


def shard(tensors, rank, ranks):
    from shard_flat_buffer import shard

    if tensors and tensors[0].dtype == tensors[-1].dtype:
        tensors = [one.astype(tensors[0].dtype) if one.ndim else one for one in tensors]
    return shard(tensors, rank, ranks)
