"""Copies only what must be padded: the shards of the others are the parameters themselves."""

SAYS = "is a view of the tensors"


def shard(tensors, rank, ranks):
    from shard_flat_buffer import shard

    own = shard(tensors, rank, ranks)
    if len(tensors) > 1 or own.size * ranks != tensors[0].size:
        return own
    return tensors[0].reshape(-1)[rank * len(own) :][: len(own)]
