"""Puts a gradient into the first bucket with room for it, as one packs boxes."""

SAYS = "an older bucket is closed"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    fill_buckets(sizes, arrival, limit)
    buckets = []
    for number in arrival:
        for bucket in buckets:
            if sum(sizes[one] for one in bucket) + sizes[number] <= limit:
                bucket.append(number)
                break
        else:
            buckets.append([number])
    return buckets
