"""Lets the first bucket grow as large as the others, so that the link begins late."""

SAYS = "of the first bucket 20"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    return plan_buckets(parameters, bucket_bytes, bucket_bytes)
