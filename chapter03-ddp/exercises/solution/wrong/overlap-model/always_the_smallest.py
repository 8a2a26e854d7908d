"""Believes that smaller buckets overlap more, and forgets what each of them costs."""

SAYS = "of equally good ones the largest"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    return min(candidates)
