"""Gives first and second choices `capacity` slots each."""

import numpy as np

SAYS = "and its slots are"


def route(scores, capacity):
    from capacity_routing import Routing, route

    plenty = route(scores, 10**9)
    slots = np.full(plenty.slots.shape, -1)
    for choice in (0, 1):
        for expert in range(scores.shape[1]):
            wanting = np.flatnonzero(plenty.experts[:, choice] == expert)[:capacity]
            slots[wanting, choice] = np.arange(len(wanting))
    return Routing(plenty.experts, slots, plenty.weights * (slots >= 0), int((slots < 0).sum()))
