"""Weighs with the softmax over all experts, so that a token's two weights do not sum to 1."""

SAYS = "the softmax over the two chosen scores"


def route(scores, capacity):
    import numpy as np
    from capacity_routing import route

    routing = route(scores, capacity)
    everything = np.exp(scores - scores.max(axis=1, keepdims=True))
    everything /= everything.sum(axis=1, keepdims=True)
    routing.weights = np.take_along_axis(everything, routing.experts, axis=1)
    return routing
