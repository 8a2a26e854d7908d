"""Cuts a gradient where the bucket is full: its rest begins the next one."""

SAYS = "expected the buckets"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    fill_buckets(sizes, arrival, limit)
    buckets, filled = [[]], 0
    for number in arrival:
        left = sizes[number]
        while filled + left > limit:
            left -= limit - filled
            buckets[-1].append(number)
            buckets.append([])
            filled = 0
        buckets[-1].append(number)
        filled += left
    return [bucket for bucket in buckets if bucket]
