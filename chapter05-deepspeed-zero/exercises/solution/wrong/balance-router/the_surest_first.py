"""Keeps the tokens with the highest gates: batch prioritized routing."""

SAYS = "expected places"


def route(logits, factor):
    import torch
    from balance_router import route

    sure = route(logits, 8.0 * logits.shape[1])[2]
    order = torch.argsort(sure.detach(), descending=True, stable=True)
    back = torch.argsort(order)
    return tuple(found[back] for found in route(logits[order], factor))
