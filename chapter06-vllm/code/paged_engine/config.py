"""How an engine is set up: its configuration, and what a process that only runs one may do."""

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlab.errors import UsageError


def _setting(default: Any, meaning: str) -> Any:
    """A field whose meaning is the help of the server's flag of the same name, too."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class EngineConfig:
    """What to serve, and within which limits: of the offline LLM, the server and every rank.

    Without `num_blocks` or `kv_cache_bytes` the runner takes what the machine can spare, without
    `max_model_len` the model's own length. `max_batch_tokens` and `max_sequences` limit a step.

    Raises:
        UsageError: a size is below 1.
    """

    model: str | Path
    dtype: str = _setting("auto", "auto: as saved; or float32, bfloat16, float16")
    device: str = _setting("auto", "auto, cpu, or cuda")
    block_size: int = _setting(16, "tokens in a block of the cache")
    num_blocks: int | None = _setting(None, "size of the cache, in blocks")
    kv_cache_bytes: int | None = _setting(None, "size of the cache, in bytes")
    max_batch_tokens: int = _setting(2048, "tokens computed in a step")
    max_sequences: int = _setting(64, "sequences in a step")
    max_model_len: int | None = _setting(None, "context, if shorter than the model's")
    tensor_parallel: int = _setting(1, "processes that share each layer")
    prefix_caching: bool = _setting(True, "share the blocks of common beginnings")
    prefix_cache: str = _setting(
        "hash", "how those are found: hash, or a policy of another package"
    )
    compile: bool = _setting(True, "compile the model's operators")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise UsageError(f"{field.name} {value} is not possible; it must be 1 or more")

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "model": str(self.model)})

    @classmethod
    def from_json(cls, text: str) -> "EngineConfig":
        return cls(**json.loads(text))


def dedicate_process() -> None:
    """Spare what is loaded by now from garbage collection; to be called when the engine is ready.

    Each step makes new objects, so Python's collector runs often, and its full collections walk
    over all of torch and transformers: 2 % of a run with 64 requests. What is there now stays
    until the process ends.
    """
    gc.collect()
    gc.freeze()
