"""Takes the first of several equally good candidates, in whatever order they come."""

SAYS = "of equally good ones the largest is wanted"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import fill_buckets, step_end

    return min(candidates, key=lambda one: step_end(*fill_buckets(gradients, one), alpha, beta))
