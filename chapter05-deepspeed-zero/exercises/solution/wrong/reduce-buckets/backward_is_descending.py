"""Takes it for granted that gradients arrive from the last parameter to the first."""

SAYS = "and come first"


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    return fill_buckets(sizes, sorted(arrival, reverse=True), limit)
