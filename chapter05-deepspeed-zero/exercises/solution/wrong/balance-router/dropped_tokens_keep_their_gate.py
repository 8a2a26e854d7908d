"""Zeroes the place of dropped tokens, not what multiplies them."""

SAYS = "expected the gates"


def route(logits, factor):
    from balance_router import route

    expert, place, _ = route(logits, factor)
    return expert, place, logits.float().softmax(1).gather(1, expert[:, None])[:, 0]
