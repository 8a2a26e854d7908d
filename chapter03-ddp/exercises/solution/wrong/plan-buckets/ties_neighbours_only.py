"""Finds a tied weight only where it comes right behind its first use."""

SAYS = "one weight with one gradient"


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from itertools import groupby
    from types import SimpleNamespace

    from plan_buckets import plan_buckets

    firsts = [next(group) for _, group in groupby(parameters, key=lambda p: p.storage)]
    own = [SimpleNamespace(**{**vars(p), "storage": number}) for number, p in enumerate(firsts)]
    return plan_buckets(own, bucket_bytes, first_bucket_bytes)
