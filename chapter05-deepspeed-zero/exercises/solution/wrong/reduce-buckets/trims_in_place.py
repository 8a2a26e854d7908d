"""Drops empty parameters from the caller's bucket."""

SAYS = "owner_slices changed its arguments"


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import owner_slices

    found = owner_slices(list(sizes), list(bucket), ranks)
    while bucket and sizes[bucket[-1]] == 0:
        bucket.pop()
    return found
