"""Which expert gets which token: the two best by the router, as long as they have room."""

from dataclasses import dataclass
from math import ceil

import torch.nn.functional as F
from torch import Tensor

CHOICES = 2  # experts of a token


@dataclass(frozen=True)
class Routing:
    """The rows that are kept, in the order of their experts: of which token, with which gate."""

    token: Tensor  # [rows]
    gate: Tensor  # [rows]
    counts: Tensor  # [experts], rows of each
    wanted: Tensor  # [experts], the same before any was dropped
    balance: Tensor  # the balance loss


def capacity(factor: float, tokens: int, experts: int) -> int:
    """The rows that an expert takes of one rank's tokens: `factor` times an even share."""
    return ceil(factor * CHOICES * tokens / experts)


def route(logits: Tensor, room: int) -> Routing:
    """Send each token of `logits` [tokens, experts] to its two best, of which each takes `room`."""
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    best, chosen = probabilities.topk(CHOICES)
    gates = best / best.sum(-1, keepdim=True)
    expert = chosen.T.flatten()  # the queue: all first choices, then all second ones
    choices = F.one_hot(expert, experts)  # [2·tokens, experts]
    place = (choices.cumsum(0) * choices).sum(-1)  # 1, 2, 3 … in the queue of its expert
    kept = (place <= room).nonzero().flatten()
    kept = kept[expert[kept].argsort(stable=True)]
    return Routing(
        token=kept % tokens,
        gate=gates.T.flatten()[kept],
        counts=expert[kept].bincount(minlength=experts),
        wanted=choices.sum(0),
        balance=experts * (choices.float().mean(0) * probabilities.mean(0)).sum(),
    )
