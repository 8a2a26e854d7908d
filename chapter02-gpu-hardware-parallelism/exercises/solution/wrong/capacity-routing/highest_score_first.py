"""Fills the slots by score: the surest token first, not the first one."""

import numpy as np

SAYS = "in the order of the tokens"


def route(scores, capacity):
    from capacity_routing import Routing, route

    order = np.argsort(-scores.max(axis=1), kind="stable") if len(scores) else np.arange(0)
    found, back = route(scores[order], capacity), np.argsort(order)
    return Routing(found.experts[back], found.slots[back], found.weights[back], found.dropped)
