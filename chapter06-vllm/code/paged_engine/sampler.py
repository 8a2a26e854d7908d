"""The next token of every sequence of a step, chosen for all rows at once.

Order of the steps, which is vLLM's: penalties, forbidden tokens, temperature, min-p, top-k, top-p,
draw. A draw takes one random number, and that is a hash of seed, sample and position: there is no
generator whose state a preemption or a neighbour in the batch could disturb.
"""

import os
from collections.abc import Sequence as List
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged_engine._sampler_draw import Filters, draw, relative_weights, thresholds
from paged_engine.request import Sequence

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
        weights.mul_(weights >= thresholds(weights, filters, vocabulary))
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
