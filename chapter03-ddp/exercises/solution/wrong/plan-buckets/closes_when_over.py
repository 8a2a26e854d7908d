"""Closes a bucket when it is over the cap, as if the last gradient were free."""

SAYS = "its cap is"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    first_use = {}
    for parameter in parameters:
        if parameter.requires_grad:
            first_use.setdefault(parameter.storage, parameter)
    buckets, filled = [], float("inf")
    for parameter in reversed(first_use.values()):
        if filled > (bucket_bytes if len(buckets) > 1 else first_bucket_bytes):
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter.name)
        filled += parameter.nbytes
    return buckets
