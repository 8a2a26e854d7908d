"""Compares ends to the last bit, where sums of another order differ."""

SAYS = "and of equally good ones the largest is wanted"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import fill_buckets, step_end

    ends = {one: step_end(*fill_buckets(gradients, one), alpha, beta) for one in candidates}
    return max(one for one, end in ends.items() if end == min(ends.values()))
