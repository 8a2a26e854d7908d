"""Fills the buckets in the order of the forward pass, whose first gradient comes last."""

SAYS = "the backward pass gives"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    return plan_buckets(parameters[::-1], bucket_bytes, first_bucket_bytes)
