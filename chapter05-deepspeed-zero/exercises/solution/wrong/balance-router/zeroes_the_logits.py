"""Routes by what it was given, which is zeros then."""

SAYS = "route changed the logits"


def route(logits, factor):
    from balance_router import route

    found = route(logits.clone(), factor)
    logits.detach().zero_()
    return found
