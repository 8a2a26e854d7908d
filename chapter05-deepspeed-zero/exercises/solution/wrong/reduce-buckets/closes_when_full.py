"""Closes a bucket as soon as it is full: then the empty gradients behind find no room."""

SAYS = "what is empty finds room"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    fill_buckets(sizes, arrival, limit)
    buckets, filled = [], limit
    for number in arrival:
        if filled >= limit or filled + sizes[number] > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(number)
        filled += sizes[number]
    return buckets
