"""Task 5, balance-router: the reference solution."""

import math

import torch
from torch.nn.functional import one_hot


def capacity(tokens, experts, factor):
    return math.ceil(tokens * factor / experts)


def route(logits, factor):
    expert = logits.argmax(1)
    column = expert[:, None]
    place = one_hot(expert, logits.shape[1]).cumsum(0).gather(1, column).squeeze(1) - 1
    kept = place < capacity(*logits.shape, factor)
    gate = logits.float().softmax(1).gather(1, column).squeeze(1)
    return expert, torch.where(kept, place, -1), gate * kept


def balancing_loss(logits):
    tokens, experts = max(1, logits.shape[0]), logits.shape[1]
    chosen = one_hot(logits.argmax(1), experts).sum(0) / tokens
    meant = logits.float().softmax(1).sum(0) / tokens
    return experts * (chosen * meant).sum()
