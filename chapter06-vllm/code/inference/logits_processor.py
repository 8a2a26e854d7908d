"""The logits processor of extend_vllm.py: forbids tokens, and forces an answer's beginning.

A server has it too: `vllm serve DIR --logits-processors inference.logits_processor:ForbidAndForce`.
A request's JSON then says `"vllm_xargs": {"forbid": [5, 7]}`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

ARGUMENTS = ("forbid", "force")


@dataclass(frozen=True)
class Wish:
    """What one request wants. `output` is vLLM's own list of its output, which grows."""

    forbid: list[int]
    force: list[int]
    output: list[int]


class ForbidAndForce(LogitsProcessor):
    """`extra_args={"forbid": [...], "force": [...]}`, each a list of token ids."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._wishes: dict[int, Wish] = {}  # by the request's row in the batch

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises `ValueError`, which a server answers with 400, before the request is queued."""
        for name in ARGUMENTS:
            value: Any = (params.extra_args or {}).get(name, [])
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise ValueError(f"{name} is {value!r}; give a list of token ids")

    def is_argmax_invariant(self) -> bool:
        """False: it changes which token is the likeliest. Greedy decoding leaves out the others."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows: first who left, then who came, then who moved. None: nothing changed."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._wishes.pop(row, None)
        for row, params, _, output in batch_update.added:
            self._put(row, _wish(params, output))
        for source, target, direction in batch_update.moved:
            moving, there = self._wishes.pop(source, None), self._wishes.pop(target, None)
            self._put(target, moving)
            if direction == MoveDirectionality.SWAP:
                self._put(source, there)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change `logits` [requests, vocab] in place."""
        for row, wish in self._wishes.items():
            place = len(wish.output)
            if place < len(wish.force):
                wanted = logits[row, wish.force[place]].clone()
                logits[row] = float("-inf")
                logits[row, wish.force[place]] = wanted
            elif wish.forbid:
                logits[row, wish.forbid] = float("-inf")
        return logits

    def _put(self, row: int, wish: Wish | None) -> None:
        """Note that `row` is the request's with this wish, or that of one without any."""
        self._wishes.pop(row, None)
        if wish is not None:
            self._wishes[row] = wish


def _wish(params: SamplingParams, output: list[int]) -> Wish | None:
    forbid, force = ((params.extra_args or {}).get(name, []) for name in ARGUMENTS)
    return Wish(forbid, force, output) if forbid or force else None
