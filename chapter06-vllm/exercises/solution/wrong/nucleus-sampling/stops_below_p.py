"""Keeps the tokens whose sum stays below p, and so loses the one that passes it."""

SAYS = "0.4 + 0.3 is below 0.75"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    whole = nucleus(logits, temperature, 1.0)
    order = np.argsort(-whole, kind="stable")
    inside = order[np.cumsum(whole[order]) <= top_p + 1e-12]
    kept = np.zeros(len(whole))
    kept[inside] = whole[inside]
    return kept / kept.sum()
