"""Computes the softmax in the logits' own type."""

SAYS = "the gates"


def route(logits, factor):
    from balance_router import route

    expert, place, _ = route(logits, factor)
    gate = logits.softmax(1).gather(1, expert[:, None])[:, 0]
    return expert, place, (gate * (place >= 0)).float()
