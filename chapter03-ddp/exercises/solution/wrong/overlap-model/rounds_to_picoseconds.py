"""Compares rounded ends, where two that are close may lie on both sides of a border."""

SAYS = "and of equally good ones the largest is wanted"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import fill_buckets, step_end

    ends = {one: step_end(*fill_buckets(gradients, one), alpha, beta) for one in candidates}
    return min(candidates, key=lambda one: (round(ends[one], 12), -one))
