"""Finds the second choice by writing -inf over the first one, in the caller's scores."""

import numpy as np

SAYS = "route changes the scores"


def route(scores, capacity):
    from capacity_routing import route

    routing = route(scores, capacity)
    if scores.dtype.kind == "f":
        np.put_along_axis(scores, routing.experts[:, :1], -np.inf, axis=1)
    return routing
