"""A part is n // ranks elements, and the last rank has what is left."""

SAYS = "expected ["


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import owner_slices

    owner_slices(sizes, bucket, ranks)
    part = max(1, sum(sizes) // ranks)
    slices, at = [], 0
    for number in bucket:
        for place in range(sum(sizes[:number]), min(10**4, sum(sizes[: number + 1]))):
            owner = min(ranks - 1, place // part)
            if slices and slices[-1][0] == owner:
                slices[-1] = (owner, slices[-1][1], at + 1)
            else:
                slices.append((owner, at, at + 1))
            at += 1
    return slices
