"""Chooses by the probabilities, of which small ones are all 0: ties that the scores have not."""

SAYS = "the experts are"


def route(scores, capacity):
    import numpy as np
    from capacity_routing import route

    likely = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64))
    chosen = route(likely / likely.sum(axis=1, keepdims=True), capacity)
    right = route(scores, 2 * len(scores))
    chosen.weights = np.where(chosen.slots >= 0, right.weights, 0.0)
    return chosen
