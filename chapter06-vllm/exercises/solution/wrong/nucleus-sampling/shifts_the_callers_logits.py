"""Subtracts the maximum where the caller's logits lie."""

SAYS = "the logits were changed"


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    logits -= logits.max()
    return nucleus(logits, temperature, top_p)
