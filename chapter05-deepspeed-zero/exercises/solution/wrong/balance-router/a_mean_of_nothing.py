"""Divides by the number of tokens, also where it is 0."""

SAYS = "no tokens"


def balancing_loss(logits):
    from torch.nn.functional import one_hot

    f = one_hot(logits.argmax(1), logits.shape[1]).float().mean(0)
    return logits.shape[1] * (f * logits.float().softmax(1).mean(0)).sum()
