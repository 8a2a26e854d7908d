"""Takes the smaller of the two caps for the first bucket's."""

SAYS = "of the first bucket"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    return plan_buckets(parameters, bucket_bytes, min(bucket_bytes, first_bucket_bytes))
