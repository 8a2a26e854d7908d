"""Leaves the kept probabilities as they were, so that they no longer sum to 1."""

SAYS = "0.4 + 0.3 is below 0.75"


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    kept = nucleus(logits, temperature, top_p)
    return nucleus(logits, temperature, 1.0) * (kept > 0)
