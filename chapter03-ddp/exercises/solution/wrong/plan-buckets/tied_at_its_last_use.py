"""Sends a tied weight's gradient with its last use, before the embedding has added its part."""

SAYS = "is whole only at the end of the backward pass"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    last_use = {parameter.storage: parameter for parameter in parameters}
    kept = [p for p in parameters if last_use[p.storage] is p]
    return plan_buckets(kept, bucket_bytes, first_bucket_bytes)
