"""Lets a gradient flow through f as if it were p."""

SAYS = "expected the gradient of the loss"


def balancing_loss(logits):
    from torch.nn.functional import one_hot

    tokens, experts = max(1, logits.shape[0]), logits.shape[1]
    p = logits.float().softmax(1)
    f = (one_hot(logits.argmax(1), experts) + p - p.detach()).sum(0) / tokens
    return experts * (f * p.sum(0) / tokens).sum()
