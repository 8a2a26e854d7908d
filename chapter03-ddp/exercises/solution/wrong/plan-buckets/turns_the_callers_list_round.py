"""Reverses the list that it was given."""

SAYS = "the list of parameters was changed"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    parameters.reverse()
    return plan_buckets(parameters[::-1], bucket_bytes, first_bucket_bytes)
