"""Closes a bucket before what does not fit, even where nothing is in it."""

SAYS = "9 are more than a bucket"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    fill_buckets(sizes, arrival, limit)
    buckets, filled = [[]], 0
    for number in arrival:
        if filled + sizes[number] > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(number)
        filled += sizes[number]
    return buckets if arrival else []
