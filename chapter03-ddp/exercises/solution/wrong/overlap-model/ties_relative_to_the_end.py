"""Takes isclose as it is: late steps are ties when they differ by a billionth."""

SAYS = "and of equally good ones the largest is wanted"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    import math

    from overlap_model import fill_buckets, step_end

    ends = {one: step_end(*fill_buckets(gradients, one), alpha, beta) for one in candidates}
    soonest = min(ends.values())
    return max(c for c, end in ends.items() if math.isclose(end, soonest, abs_tol=1e-12))
