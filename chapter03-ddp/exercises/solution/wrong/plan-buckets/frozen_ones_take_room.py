"""Leaves the frozen ones' names out, and not their bytes."""

SAYS = "(frozen)"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from dataclasses import replace

    from plan_buckets import plan_buckets

    frozen = {p.name for p in parameters if not p.requires_grad}
    trained = [replace(p, requires_grad=True) for p in parameters]
    plan = plan_buckets(trained, bucket_bytes, first_bucket_bytes)
    kept = [[name for name in bucket if name not in frozen] for bucket in plan]
    return [bucket for bucket in kept if bucket]
