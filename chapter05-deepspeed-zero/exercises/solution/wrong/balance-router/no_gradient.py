"""Detaches the gates with the choice."""

SAYS = "no gradient flows through the gates"


def route(logits, factor):
    from balance_router import route

    return route(logits.detach(), factor)
