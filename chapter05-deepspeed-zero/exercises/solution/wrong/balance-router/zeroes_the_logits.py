"""Routes by what it was given, which is zeros then."""

SAYS = "expected"


def route(logits, factor):
    from balance_router import route

    found = route(logits.clone(), factor)
    logits.detach().zero_()
    return found
