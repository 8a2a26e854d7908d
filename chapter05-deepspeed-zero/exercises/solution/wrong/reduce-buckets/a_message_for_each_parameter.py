"""Does not merge what has one owner."""

SAYS = "one rank: one message"


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import pieces

    return [piece[:3] for piece in pieces(sizes, bucket, ranks)]
