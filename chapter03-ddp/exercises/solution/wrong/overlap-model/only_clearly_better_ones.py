"""Comes from the largest, and leaves it only for what is clearly better than it."""

SAYS = "and of equally good ones the largest is wanted"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import fill_buckets, step_end

    ends = {one: step_end(*fill_buckets(gradients, one), alpha, beta) for one in candidates}
    best = max(ends)
    for one in sorted(ends, reverse=True):
        if ends[one] < ends[best] - 1e-12:
            best = one
    return best
