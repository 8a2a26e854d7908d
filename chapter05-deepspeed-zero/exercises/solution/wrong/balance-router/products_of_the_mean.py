"""Squares p: smooth, and not the load."""

SAYS = "expected the loss"


def balancing_loss(logits):
    meant = logits.float().softmax(1).sum(0) / max(1, len(logits))
    return logits.shape[1] * meant.square().sum()
