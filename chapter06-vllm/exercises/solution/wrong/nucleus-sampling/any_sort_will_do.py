"""Sorts with a method that mixes up equal ones when there are more than a few."""

SAYS = "tokens are kept, expected"


def nucleus(logits, temperature, top_p):
    import numpy as np
    from nucleus_sampling import nucleus

    whole = nucleus(logits, temperature, 1.0)
    if temperature == 0 or top_p >= 1:
        return whole
    order = np.argsort(-whole)
    ends = np.cumsum(whole[order])
    inside = order[: int((ends < top_p - 1e-12).sum()) + 1]
    kept = np.zeros(len(whole))
    kept[inside] = whole[inside]
    return kept / kept.sum()
