"""From an owner's first element in the bucket to its last: others' lie between."""

SAYS = "0 has two slices, apart"


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import owner_slices

    ends = {}
    for owner, begin, end in owner_slices(sizes, bucket, ranks):
        ends[owner] = ends.get(owner, (begin,))[0], end
    return [(owner, *both) for owner, both in ends.items()]
