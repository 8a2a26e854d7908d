"""Closes a bucket that would be exactly full: >= for >."""

SAYS = "would have fitted"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    return plan_buckets(parameters, bucket_bytes - 1, first_bucket_bytes - 1)
