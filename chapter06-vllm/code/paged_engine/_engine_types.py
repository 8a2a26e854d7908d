"""What goes into an engine and what comes out: its settings, its outputs, its counters."""

from dataclasses import dataclass
from pathlib import Path

from distlab.errors import UsageError
from paged_engine.request import FinishReason
from paged_engine.sampler import SampledToken

_SIZES = (
    "block_size", "num_blocks", "kv_cache_bytes", "max_batch_tokens", "max_sequences",
    "max_model_len", "tensor_parallel",
)  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """What to serve, and with how much memory; the limits are those of a step.

    Without `num_blocks` or `kv_cache_bytes` the runner takes what the machine can spare, without
    `max_model_len` the model's own length. `tensor_parallel`: number of processes.

    Raises:
        UsageError: a size is below 1.
    """

    model: str | Path
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    max_model_len: int | None = None
    prefix_caching: bool = True
    tensor_parallel: int = 1
    compile: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not possible; it must be 1 or more")


@dataclass(slots=True)
class Output:
    """What a step brought one sequence: a token, and the text that is certain with it.

    `text` may be empty while a character or a possible stop string is incomplete; the last token's
    output has the rest and the `finish_reason`. `arrival` and `time` are `time.monotonic()` when
    the request came and when the step ended. `cached_tokens`: of the prompt, by the prefix cache.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[SampledToken] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    arrival: float
    time: float


@dataclass(frozen=True)
class EngineStats:
    """The engine now (sequences, share of the cache in use), and its counters since the start.

    Queries and hits of the prefix cache are in tokens. `prompt_tokens` counts prompts whose first
    token is out.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
