"""Detaches p, and f has no gradient."""

SAYS = "no gradient flows through p"


def balancing_loss(logits):
    from balance_router import balancing_loss

    return balancing_loss(logits.detach())
