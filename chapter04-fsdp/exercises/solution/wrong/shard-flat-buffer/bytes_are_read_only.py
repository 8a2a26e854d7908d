"""np.frombuffer of bytes: what comes back cannot be trained."""

SAYS = "cannot be written to"


def unshard(shards, shapes):
    import numpy as np
    from shard_flat_buffer import unshard

    tensors = unshard(shards, shapes)
    return [np.frombuffer(t.tobytes(), t.dtype).reshape(t.shape) for t in tensors]
