"""Task 6, nucleus-sampling: the reference solution."""

import numpy as np


def nucleus(logits, temperature, top_p):
    logits = np.asarray(logits, dtype=np.float64)
    kept = np.zeros(len(logits))
    if temperature == 0:
        kept[logits.argmax()] = 1.0
        return kept
    likely = np.exp((logits - logits.max()) / temperature)
    likely /= likely.sum()
    order = np.argsort(-likely, kind="stable")
    before = np.cumsum(likely[order]) - likely[order]
    inside = order if top_p >= 1 else order[before < top_p - 1e-12]
    kept[inside] = likely[inside]
    return kept / kept.sum()


def draw(probabilities, uniform):
    possible = np.flatnonzero(probabilities)
    ends = np.cumsum(probabilities[possible], dtype=np.float64)
    place = np.searchsorted(ends, uniform, side="right")
    return int(possible[min(place, len(possible) - 1)])
