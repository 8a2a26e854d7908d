"""Computes in the logits' own type, where half precision has three digits."""

SAYS = "the smallest of all sets"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    if temperature == 0:
        return nucleus(logits, temperature, top_p)
    likely = np.exp((logits - logits.max()) / logits.dtype.type(temperature))
    likely /= likely.sum()
    with np.errstate(divide="ignore"):
        return nucleus(np.log(likely.astype(np.float64)), 1.0, top_p)
