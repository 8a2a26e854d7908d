"""Takes every low temperature for greedy, and so the first of tokens that are equally likely."""

SAYS = "warmed up, then cut"


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    return nucleus(logits, temperature if temperature >= 0.01 else 0, top_p)
