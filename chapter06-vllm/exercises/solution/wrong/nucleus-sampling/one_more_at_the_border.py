"""Takes one more where the sum is top_p exactly: <= for <."""

SAYS = "make it exactly"


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    return nucleus(logits, temperature, min(1.0, top_p + 1e-9))
