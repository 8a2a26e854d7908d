"""How the tokens of a request are chosen, and when it ends: checked before it enters the engine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from distlab.errors import UsageError

MOST_SAMPLES, MOST_LOGPROBS = 128, 20  # what the OpenAI API allows
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs")
NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """Names, meanings and defaults are vLLM's; `stop` may also be given as one string or a list.

    A token may be sampled if it is among the `top_k` most probable (0 or -1: no limit), among the
    fewest that have the probability `top_p` together, and at least `min_p` times as probable as
    the most probable one. Temperature 0 is greedy. `seed` makes the request's tokens repeatable
    whatever else is in the batch. `logprobs`: how many of the most probable tokens are reported.

    Raises:
        UsageError: names the field, its value, and what it may be.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        self._check_types()
        self._require("n", 1 <= self.n <= MOST_SAMPLES, f"between 1 and {MOST_SAMPLES}")
        self._require("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._require("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (no limit)")
        self._require("top_k", self.top_k >= -1, "1 or more, or 0 for no limit")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 (no limit) and 1")
        self._require("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, -2 <= getattr(self, name) <= 2, "between -2 and 2; 0 is none")
        self._require("seed", -(2**63) <= (self.seed or 0) < 2**63, "an integer of 64 bits")
        self._require("max_tokens", self.max_tokens >= 1, "1 or more")
        most = self.max_tokens
        self._require(
            "min_tokens", 0 <= self.min_tokens <= most, f"between 0 and max_tokens, {most}"
        )
        allowed = f"between 0 and {MOST_LOGPROBS}"
        self._require("logprobs", 0 <= (self.logprobs or 0) <= MOST_LOGPROBS, allowed)

    @cached_property  # these two are asked for in every step
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @cached_property
    def adjusts_logits(self) -> bool:
        """Whether some tokens are penalised, or forbidden at first."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.min_tokens)

    def _check_types(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name in INTEGERS:
            value = getattr(self, name)
            self._require(
                name, _is_int(value) or (value is None and name in optional), "an integer"
            )
        for name in NUMBERS:
            value = getattr(self, name)
            finite = _is_int(value) or (isinstance(value, float) and math.isfinite(value))
            self._require(name, finite, "a finite number")
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        strings = all(isinstance(text, str) and text for text in self.stop)
        self._require("stop", strings, "strings, none of them empty")
        ids = all(_is_int(token) and token >= 0 for token in self.stop_token_ids)
        self._require("stop_token_ids", ids, "token ids, which are integers of 0 or more")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise UsageError(f"{name} {value!r} is not possible; it must be {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple:
    """One string, a list, None: the OpenAI API takes all of them."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)
