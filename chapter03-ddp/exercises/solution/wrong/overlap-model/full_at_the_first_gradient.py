"""Takes a bucket for full when its first gradient is ready."""

SAYS = "when their last gradient is ready"


def fill_buckets(gradients, bucket_bytes):
    ready, sizes = [], []
    for when, size in gradients:
        if sizes and sizes[-1] + size <= bucket_bytes:
            sizes[-1] += size
        else:
            ready.append(when)
            sizes.append(size)
    return ready, sizes
