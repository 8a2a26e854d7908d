"""Drawing a token from each row of a batch of distributions, filtered, without sorting them.

Nobody needs sorted probabilities: each filter keeps the tokens above some threshold, and a partial
selection finds it. Nobody needs normalised ones either: a draw multiplies its random number by
their sum. A *weight* here is a probability up to a factor for each row, the largest being 1.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 256  # weights summed together before a draw looks into one such block
FIRST_LOOK = 512  # how many of the largest weights top-p inspects before it asks for more


class Filters(NamedTuple):
    """What each row keeps; a filter that is off is the size of the vocabulary, 1 or 0."""

    top_k: Tensor  # [rows, 1]
    top_p: Tensor  # [rows, 1]
    min_p: Tensor  # [rows, 1]

    def of(self, rows: Tensor) -> "Filters":
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def relative_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weights [rows, vocabulary padded with 0 to whole blocks] of `logits` [rows, vocabulary].

    `temperature` [rows, 1] is above 0.
    """
    rows, vocabulary = logits.shape
    weights = logits.new_zeros(rows, -(-vocabulary // BLOCK) * BLOCK)
    inside = weights[:, :vocabulary]
    torch.sub(logits, logits.amax(-1, keepdim=True), out=inside)  # first: temperatures may be tiny
    inside.div_(temperature).exp_()
    return weights


def thresholds(weights: Tensor, filters: Filters, vocabulary: int) -> Tensor:
    """The smallest weight [rows, 1] that each row keeps; equal weights stay or go together.

    The tokens that min-p and top-k leave share the whole probability; of it, top-p keeps the fewest
    likeliest tokens that have `top_p` together (Holtzman et al. 2020, section 3.1).
    """
    result = filters.min_p.clone()
    limited = filters.top_k < vocabulary
    rows = torch.nonzero(limited | (filters.top_p < 1))[:, 0]
    count = max(FIRST_LOOK, int(filters.top_k.where(limited, 0).max()) + 1)
    while len(rows):
        part = weights[rows]
        whole = count >= vocabulary
        found, cut = _cut(_largest(part, min(count, vocabulary)), _sum(part), filters.of(rows))
        found |= whole
        result[rows[found]] = cut[found]
        rows, count = rows[~found], count * 16
    return result


def _cut(largest: Tensor, total: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Whether the `largest` weights [rows, count], in falling order, are enough; the threshold."""
    count, last = largest.shape[1], largest[:, -1:]
    kth = largest.gather(1, filters.top_k.clamp(max=count) - 1)
    floor = torch.where(filters.top_k <= count, kth.maximum(filters.min_p), filters.min_p)
    together = largest.mul(largest >= floor).double().cumsum(-1)
    mass = torch.where(floor > last, together[:, -1:], total)
    crossing = (together < filters.top_p * mass).sum(-1, keepdim=True).clamp(max=count - 1)
    cut = torch.where(filters.top_p < 1, largest.gather(1, crossing).maximum(floor), floor)
    mass_is_known = (floor > last) | (floor == 0)
    return (mass_is_known & (cut > last))[:, 0], cut


def _largest(weights: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, in falling order."""
    if weights.device.type != "cpu":
        return weights.topk(count).values
    values = weights.numpy()
    if count < values.shape[1]:
        values = np.partition(values, values.shape[1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def _sum(weights: Tensor) -> Tensor:
    return weights.view(len(weights), -1, BLOCK).sum(-1).double().sum(-1, keepdim=True)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """A token [rows] by its weight [rows, a multiple of BLOCK], from `uniform` [rows, 1] in [0, 1).

    The inverse of the cumulative distribution, looked up first among blocks and then within one.
    """
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1).double()  # [rows, blocks]
    block, rest = _locate(sums, uniform * sums.sum(-1, keepdim=True))
    inside = blocks[torch.arange(len(weights), device=weights.device), block[:, 0]].double()
    place, _ = _locate(inside, rest)
    return (block * BLOCK + place)[:, 0]


def _locate(sizes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the intervals laid end to end contains `target` [rows, 1], and how deep inside."""
    ends = sizes.cumsum(-1)
    target = target.minimum(ends[:, -1:] * (1 - 1e-15))  # rounding must not lead past the end
    place = torch.searchsorted(ends, target, right=True).clamp(max=sizes.shape[1] - 1)
    return place, target - (ends.gather(1, place) - sizes.gather(1, place))
