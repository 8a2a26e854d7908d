"""Cuts the tail off first and warms up what is left."""

SAYS = "cold, the first token alone"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    if temperature == 0:
        return nucleus(logits, 0, top_p)
    kept = nucleus(logits, 1.0, top_p)
    with np.errstate(divide="ignore"):
        return nucleus(np.log(kept), temperature, 1.0)
