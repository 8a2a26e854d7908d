"""Top-1 normalised over the chosen experts: always 1, and the router learns nothing."""

SAYS = "expected the gates"


def route(logits, factor):
    from balance_router import route

    expert, place, gate = route(logits, factor)
    return expert, place, gate / gate.detach().where(gate > 0, 1)
