"""Takes exponentials that overflow."""

SAYS = "nan or inf"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    if temperature == 0:
        return nucleus(logits, 0, top_p)
    likely = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
    likely = likely / likely.sum()
    with np.errstate(divide="ignore"):
        return nucleus(np.log(likely), 1.0, top_p)
