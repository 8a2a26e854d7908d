"""Compares what softmax makes of the logits: what was different may be equal then."""

SAYS = "expected expert"


def route(logits, factor):
    from balance_router import route

    return route(logits.float().softmax(1).log(), factor)
