"""Counts from the beginning of the flat buffer, not of the part."""

SAYS = "the part begins anew"


def landings(sizes, bucket, ranks, rank):
    from reduce_buckets import landings

    part = -(-sum(sizes) // max(1, ranks))
    found = landings(sizes, bucket, ranks, rank)
    return [(begin, end, there + rank * part) for begin, end, there in found]
