"""f of the tokens that found a place with a factor of 1: a full expert looks well."""

SAYS = "expected the loss"


def balancing_loss(logits):
    import torch
    from balance_router import route
    from torch.nn.functional import one_hot

    tokens, experts = max(1, logits.shape[0]), logits.shape[1]
    expert, place, _ = route(logits, 1.0)
    f = torch.where(place[:, None] >= 0, one_hot(expert, experts), 0).sum(0) / tokens
    return experts * (f * logits.float().softmax(1).sum(0) / tokens).sum()
