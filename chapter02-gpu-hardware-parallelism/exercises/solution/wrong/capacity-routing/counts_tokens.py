"""Counts tokens that lost a choice, not choices."""

SAYS = "dropped says"


def route(scores, capacity):
    from capacity_routing import route

    routing = route(scores, capacity)
    routing.dropped = int((routing.slots < 0).any(axis=1).sum())
    return routing
