"""Task 1, plan-buckets: the reference solution."""


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    first_use = {}
    for parameter in parameters:
        if parameter.requires_grad:
            first_use.setdefault(parameter.storage, parameter)
    buckets, filled = [], 0
    for parameter in reversed(first_use.values()):
        cap = bucket_bytes if len(buckets) > 1 else first_bucket_bytes
        if not buckets or filled + parameter.nbytes > cap:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter.name)
        filled += parameter.nbytes
    return buckets
