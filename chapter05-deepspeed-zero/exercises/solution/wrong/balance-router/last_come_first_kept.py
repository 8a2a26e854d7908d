"""Fills places from the last token on."""

SAYS = "expected place"


def route(logits, factor):
    from balance_router import route

    return tuple(found.flip(0) for found in route(logits.flip(0), factor))
