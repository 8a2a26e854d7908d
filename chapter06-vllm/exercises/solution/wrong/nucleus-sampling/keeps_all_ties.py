"""Keeps whatever is as likely as the last one that is needed."""

SAYS = "equal tokens, of which the first 1"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    kept, whole = nucleus(logits, temperature, top_p), nucleus(logits, temperature, 1.0)
    kept = np.where(whole >= whole[kept > 0].min(), whole, 0.0)
    return kept / kept.sum()
