"""Sorts the list of candidates that it was given."""

SAYS = "best_bucket_bytes changed the lists"


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import best_bucket_bytes

    candidates.sort()
    return best_bucket_bytes(gradients, candidates, alpha, beta)
