"""Trusts that NumPy's default sort keeps the order of equals, as it does for a few experts."""

import numpy as np

SAYS = "the experts are"


def route(scores, capacity):
    import capacity_routing

    order = np.argsort(-scores, axis=1)
    routing = capacity_routing.route(np.take_along_axis(scores, order, axis=1), capacity)
    routing.experts = np.take_along_axis(order, routing.experts, axis=1)
    return routing
