"""Puts a gradient into the first bucket with room for it, also one that was closed before."""

SAYS = "the backward pass gives the gradients in the order"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    size = {p.name: p.nbytes for p in parameters}
    buckets = []
    for [name] in plan_buckets(parameters, 1, 1):
        caps = [first_bucket_bytes, *[bucket_bytes] * len(buckets)]
        for bucket, cap in zip(buckets, caps, strict=False):
            if sum(map(size.get, bucket)) + size[name] <= cap:
                bucket.append(name)
                break
        else:
            buckets.append([name])
    return buckets
