"""Gives a parameter to the owner of its first element."""

SAYS = "expected ["


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import owner_slices

    part = -(-sum(sizes) // max(1, ranks))
    owner_slices(sizes, bucket, ranks)
    slices, filled = [], 0
    for number in bucket:
        if sizes[number]:
            owner = sum(sizes[:number]) // part
            slices.append((owner, filled, filled + sizes[number]))
            if len(slices) > 1 and slices[-2][0] == owner:
                slices[-2:] = [(owner, slices[-2][1], slices[-1][2])]
            filled += sizes[number]
    return slices
