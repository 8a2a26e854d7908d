"""Hands a bucket over when the next gradient does not fit; after the last one none comes."""

SAYS = "expected the buckets"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    return fill_buckets(sizes, arrival, limit)[:-1]
