"""Takes the last of equal experts."""

SAYS = "the lowest of equals"


def route(logits, factor):
    from balance_router import route

    expert, place, gate = route(logits.flip(1), factor)
    return logits.shape[1] - 1 - expert, place, gate
