"""Closes a bucket that would be exactly full: < for <=."""

SAYS = "in buckets of at most 8 bytes: the sizes are"


def fill_buckets(gradients, bucket_bytes):
    from overlap_model import fill_buckets

    return fill_buckets(gradients, bucket_bytes - 1e-6)
