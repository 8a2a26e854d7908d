"""What travels through the engine: a request, and the sequences (its samples) that answer it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from paged_engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


class Status(Enum):
    """Where a sequence is. A preempted one waits again; it keeps its tokens, but no block."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)  # two sequences are the same only if they are one object
class Sequence:
    """One answer in the making: the prompt's tokens and, after them, those sampled so far.

    `block_table[i]` is the cache block that holds the keys and values of tokens
    [i * block_size, (i + 1) * block_size); the first `computed` tokens are in the cache.
    """

    request: "Request"
    index: int  # 0 .. n-1: which of the request's samples
    token_ids: list[int]
    prompt_length: int
    block_table: list[int] = field(default_factory=list)
    computed: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    logprobs: list[Any] = field(default_factory=list)  # one per output token, where asked for
    block_hashes: list[bytes] = field(default_factory=list, repr=False)  # of its full blocks
    cached_tokens: int = 0  # of the prompt, found in the cache when it was first admitted
    preemptions: int = 0

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED


class Request:
    """A prompt and what is wanted of it: `params.n` sequences, which share the prompt's blocks.

    `arrival`: seconds on the engine's clock. The tokens of `eos_token_ids` end a sequence.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        arrival: float = 0.0,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.arrival = arrival
        self.eos_token_ids = eos_token_ids
        length = len(self.prompt_ids)
        self.sequences = [
            Sequence(self, index, list(self.prompt_ids), length) for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)
