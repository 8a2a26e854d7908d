"""The next token of every sequence of a step, chosen for all rows at once.

Order of the steps, which is vLLM's: penalties, forbidden tokens, temperature, min-p, top-k, top-p,
draw. A draw takes one random number, and that is a hash of seed, sample and position: there is no
generator whose state a preemption or a neighbour in the batch could disturb.

Nobody needs sorted probabilities: each filter keeps the tokens above some threshold, and a partial
selection finds it. Nobody needs normalised ones either: a draw multiplies its random number by
their sum. A *weight* here is a probability up to a factor for each row, the largest being 1.
"""

import os
from collections.abc import Sequence as List
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged_engine.request import Sequence

BLOCK = 256  # weights summed together before a draw looks into one such block
FIRST_LOOK = 512  # how many of the largest weights top-p inspects before it asks for more
_PROCESS_SALT = os.urandom(8).hex()  # for requests without a seed


class SampledToken(NamedTuple):
    """A token; where asked for, its log probability and those of the likeliest tokens.

    The log probabilities (nats) are the model's own, before penalties, filters and temperature, as
    vLLM reports them by default. `top` is in falling order.
    """

    token: int
    logprob: float | None = None
    top: dict[int, float] | None = None


@torch.inference_mode()
def sample(logits: Tensor, sequences: List[Sequence]) -> list[SampledToken]:
    """One token for each row of `logits` [rows, vocabulary], which are not changed.

    `sequences[row]` says how, and what came before. Ties of an argmax go to the smallest token id,
    as in torch. The same seed gives a sequence the same tokens whatever else is in the batch, as
    far as its logits are the same.
    """
    adjusted = _adjust(logits, sequences)
    tokens = _choose(adjusted, sequences)
    asked = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if not asked:
        return [SampledToken(token) for token in tokens]
    return _with_logprobs(logits, sequences, tokens, asked)


def _choose(logits: Tensor, sequences: List[Sequence]) -> list[int]:
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if not drawn:
        return _argmax(logits)
    if len(drawn) == len(sequences):
        return _draw_rows(logits, sequences)
    tokens = _argmax(logits)
    chosen = _draw_rows(logits[drawn], [sequences[row] for row in drawn])
    for row, token in zip(drawn, chosen, strict=True):
        tokens[row] = token
    return tokens


def _argmax(logits: Tensor) -> list[int]:
    if logits.device.type == "cpu":  # NumPy compares a vector of numbers at once, torch does not
        return logits.numpy().argmax(-1).tolist()
    return logits.argmax(-1).tolist()


def _draw_rows(logits: Tensor, sequences: List[Sequence]) -> list[int]:
    device, vocabulary = logits.device, logits.shape[1]
    params = [sequence.params for sequence in sequences]
    weights = relative_weights(logits, _column([p.temperature for p in params], device))
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    top_p, min_p = [p.top_p for p in params], [p.min_p for p in params]
    if min(top_k) < vocabulary or min(top_p) < 1 or max(min_p) > 0:
        filters = Filters(
            _column(top_k, device, torch.int64), _column(top_p, device), _column(min_p, device)
        )
        keep(weights, filters, vocabulary)
    uniform = _column([_uniform(sequence) for sequence in sequences], device, torch.float64)
    return draw(weights, uniform).tolist()


def _uniform(sequence: Sequence) -> float:
    """The random number of this sequence's next token: a hash of seed, sample and position."""
    request = sequence.request
    seed = request.params.seed
    source = f"{_PROCESS_SALT} {request.request_id}" if seed is None else str(seed)
    counter = f"{source} {sequence.index} {sequence.num_output}".encode()
    return (int.from_bytes(blake2b(counter, digest_size=8).digest(), "big") >> 11) / 2**53


def _adjust(logits: Tensor, sequences: List[Sequence]) -> Tensor:
    """The logits after penalties, and with minus infinity where a token is forbidden."""
    repeats, counts, forbidden = [], [], []
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if not params.adjusts_logits:
            continue
        if params.repetition_penalty != 1:
            repeats.append(row)
        if params.presence_penalty or params.frequency_penalty:
            counts.append(row)
        if sequence.num_output < params.min_tokens:
            ends = set(params.stop_token_ids)
            ends |= frozenset() if params.ignore_eos else sequence.request.eos_token_ids
            forbidden += [(row, token) for token in ends if token < logits.shape[1]]
    if not (repeats or counts or forbidden):
        return logits
    logits = logits.clone()
    if repeats:
        _penalise_repetition(logits, sequences, repeats)
    if counts:
        _penalise_counts(logits, sequences, counts)
    if forbidden:
        rows, tokens = zip(*forbidden, strict=True)
        logits[list(rows), list(tokens)] = -torch.inf
    return logits


def _penalise_repetition(logits: Tensor, sequences: List[Sequence], rows: list[int]) -> None:
    """Divide what speaks for a token seen before (Keskar et al. 2019, section 4.1)."""
    place, tokens, _ = _occurrences(rows, [sequences[row].token_ids for row in rows], logits)
    factor = _column([sequence.params.repetition_penalty for sequence in sequences], logits.device)
    seen, factor = logits[place, tokens], factor[place, 0]
    logits[place, tokens] = torch.where(seen > 0, seen / factor, seen * factor)


def _penalise_counts(logits: Tensor, sequences: List[Sequence], rows: list[int]) -> None:
    """OpenAI's penalties: for each time that the output has a token, and for its being there."""
    place, tokens, times = _occurrences(rows, [sequences[row].output_ids for row in rows], logits)
    params = [sequence.params for sequence in sequences]
    frequency = _column([p.frequency_penalty for p in params], logits.device)[place, 0]
    presence = _column([p.presence_penalty for p in params], logits.device)[place, 0]
    logits[place, tokens] -= times * frequency + presence


def _occurrences(
    rows: list[int], ids: list[list[int]], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and number of times, each [pairs], of every token in the `ids` of `rows`."""
    vocabulary = logits.shape[1]
    keys = [row * vocabulary + np.asarray(i, np.int64) for row, i in zip(rows, ids, strict=True)]
    pairs, times = np.unique(np.concatenate(keys), return_counts=True)
    found = (pairs // vocabulary, pairs % vocabulary, times)
    place, tokens, number = (torch.from_numpy(array).to(logits.device) for array in found)
    return place, tokens, number


def _with_logprobs(
    logits: Tensor, sequences: List[Sequence], tokens: list[int], rows: list[int]
) -> list[SampledToken]:
    result = [SampledToken(token) for token in tokens]
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    own = logprobs.gather(1, _column([tokens[row] for row in rows], logits.device, torch.int64))
    most = max(1, *(sequences[row].params.logprobs or 0 for row in rows))
    best = logprobs.topk(min(most, logits.shape[1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    for i, (row, logprob) in enumerate(zip(rows, own[:, 0].tolist(), strict=True)):
        wanted = sequences[row].params.logprobs
        top = dict(zip(ids[i][:wanted], values[i][:wanted], strict=True))
        result[row] = SampledToken(tokens[row], logprob, top)
    return result


def _column(values: list, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, 1]"""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


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


def keep(weights: Tensor, filters: Filters, vocabulary: int) -> None:
    """Make all weights 0 in place that a filter cuts off.

    Equal weights stay or go together by min-p and top-k, as in vLLM. The tokens that those two
    leave share the whole probability; of it, top-p keeps the fewest likeliest tokens that have
    `top_p` together (Holtzman et al. 2020, section 3.1): of equal ones those with small ids.
    """
    cut, spare = _thresholds(weights, filters, vocabulary)
    weights.mul_(weights >= cut)
    for row in spare.nonzero()[:, 0].tolist():
        equal = (weights[row] == cut[row]).nonzero()[:, 0]
        weights[row, equal[len(equal) - int(spare[row]) :]] = 0


def _thresholds(weights: Tensor, filters: Filters, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The smallest weight [rows, 1] that each row keeps; how many of those equal to it go [rows]"""
    result = filters.min_p.clone()
    spare = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    limited = filters.top_k < vocabulary
    rows = torch.nonzero(limited | (filters.top_p < 1))[:, 0]
    count = max(FIRST_LOOK, int(filters.top_k.where(limited, 0).max()) + 1)
    while len(rows):
        part = weights[rows]
        whole = count >= vocabulary
        largest = _largest(part, min(count, vocabulary))
        found, cut, ties = _cut(largest, _sum(part), filters.of(rows))
        found |= whole
        result[rows[found]], spare[rows[found]] = cut[found], ties[found]
        rows, count = rows[~found], count * 16
    return result, spare


def _cut(largest: Tensor, total: Tensor, filters: Filters) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the `largest` weights [rows, count], in falling order, are enough; the threshold; how
    many that equal it top-p does not need [rows]."""
    count, last = largest.shape[1], largest[:, -1:]
    kth = largest.gather(1, filters.top_k.clamp(max=count) - 1)
    floor = torch.where(filters.top_k <= count, kth.maximum(filters.min_p), filters.min_p)
    together = largest.mul(largest >= floor).double().cumsum(-1)
    mass = torch.where(floor > last, together[:, -1:], total)
    crossing = (together < filters.top_p * mass).sum(-1, keepdim=True).clamp(max=count - 1)
    cut = torch.where(filters.top_p < 1, largest.gather(1, crossing).maximum(floor), floor)
    kept = largest >= cut
    by_mass = (filters.top_p < 1) & (cut == largest.gather(1, crossing))
    ties = (kept.sum(-1, keepdim=True) - crossing - 1).where(by_mass, 0)[:, 0]
    mass_is_known = (floor > last) | (floor == 0)
    return (mass_is_known & (cut > last))[:, 0], cut, ties


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
