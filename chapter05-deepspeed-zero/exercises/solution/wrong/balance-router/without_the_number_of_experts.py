"""Forgets the factor that makes an even load 1."""

SAYS = "expected the loss"


def balancing_loss(logits):
    from balance_router import balancing_loss

    return balancing_loss(logits) / logits.shape[1]
