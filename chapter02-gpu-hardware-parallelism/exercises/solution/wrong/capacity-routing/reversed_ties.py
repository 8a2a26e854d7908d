"""Sorts upwards and turns the order round, and with it that of equal scores."""

SAYS = "scores [5.0, 5.0, 5.0] (float64): the experts are [2, 1], expected [0, 1]"


def route(scores, capacity):
    from capacity_routing import route

    routing = route(scores[:, ::-1], capacity)
    routing.experts = scores.shape[1] - 1 - routing.experts
    return routing
