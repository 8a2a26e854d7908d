"""Scales the other choice up where one is dropped."""

SAYS = "was scaled up"


def route(scores, capacity):
    import numpy as np
    from capacity_routing import route

    routing = route(scores, capacity)
    total = routing.weights.sum(axis=1, keepdims=True)
    routing.weights = routing.weights / np.where(total > 0, total, 1.0)
    return routing
