"""Goes by names, so that a tied weight travels twice."""

SAYS = "one weight with one gradient"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from types import SimpleNamespace

    from plan_buckets import plan_buckets

    own = [
        SimpleNamespace(name=p.name, storage=number, nbytes=p.nbytes, requires_grad=p.requires_grad)
        for number, p in enumerate(parameters)
    ]
    return plan_buckets(own, bucket_bytes, first_bucket_bytes)
