"""Turns a sorted order round, and with it that of equal tokens."""

SAYS = "tokens are kept, expected"


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    return (
        nucleus(logits[::-1], temperature, top_p)[::-1].copy()
        if temperature
        else nucleus(logits, 0, top_p)
    )
