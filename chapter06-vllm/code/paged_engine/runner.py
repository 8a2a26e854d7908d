"""The model behind the scheduler: weights, cache and the step from a batch to logits.

    runner = ModelRunner(EngineConfig("SmolLM2-135M-Instruct"))
    logits = runner.execute(scheduler.schedule())

Everything that depends on the machine is decided here: device, dtype, how many blocks its memory
holds, one process or several.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distlab.errors import UsageError
from paged_engine import kernels
from paged_engine.attention import PagedCache
from paged_engine.batch import Batch
from paged_engine.config import EngineConfig
from paged_engine.loading import DTYPES, Part, check_split, eos_token_ids, read_shape
from paged_engine.parallel import TensorParallel
from paged_engine.shard import Shard


class ModelRunner:
    """Loads a model directory and executes the scheduler's batches.

    Its own `settings` are those of the configuration with dtype, device and length decided.
    Without `num_blocks` or `kv_cache_bytes` the cache is what the memory allows, at most what
    `max_sequences` of `max_model_len` tokens need. `compile`: whether CUDA decodes are captured as
    graphs.

    Raises `UsageError` for what cannot be, in the words of the command line, and `RunError` for a
    damaged model; see `loading`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.shape = read_shape(config.model)
        self.config = self.shape.config
        self.eos_token_ids = eos_token_ids(config.model)
        self.max_model_len = _max_model_len(config.max_model_len, self.shape.max_length)
        check_split(self.config, config.tensor_parallel)
        self.settings = replace(
            config,
            dtype=_dtype(config.dtype, self.shape.dtype),
            device=_device(config.device, config.tensor_parallel),
            max_model_len=self.max_model_len,
        )
        self.group = TensorParallel(self.settings) if config.tensor_parallel > 1 else None
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def execute(self, batch: Batch) -> Tensor:
        """Copy the blocks that `batch` wants copied, then compute its chunks.

        Returns logits [rows, vocab] in float32, on the device: one row for each chunk that
        samples, in the order of the chunks. Raises `RunError` when a process of a tensor-parallel
        model is gone.
        """
        return self.shard.run(batch) if self.group is None else self.group.run(batch)

    @property
    def cache(self) -> PagedCache:
        """The keys and values, to be copied out and in between two steps.

        Raises `UsageError` where several processes hold a part each.
        """
        if self.group is not None:
            raise UsageError(
                f"--tensor-parallel {self.settings.tensor_parallel}: each process holds a part of "
                "every block, which cannot be copied out; use --tensor-parallel 1"
            )
        return self.shard.cache

    @property
    def description(self) -> str:
        """One line: the device, the types, and the ways that were chosen."""
        return ", ".join(
            [
                f"{self.shape.architecture} on {self.shard.device}",
                f"{self.settings.dtype} weights and cache",
                f"{self.num_blocks} blocks of {self.settings.block_size} tokens",
                f"attention by {self.shard.kernel}",
                *(["decodes as CUDA graphs"] if self.shard.graphs else []),
                kernels.describe(),
                *([f"tensor parallel over {self.settings.tensor_parallel}"] if self.group else []),
            ]
        )

    def close(self) -> None:
        """End the other processes, if any; may be called again."""
        if self.group is not None:
            self.group.close()

    def _build(self) -> None:
        self.shard = self.group.shard if self.group else Shard(self.settings, Part())
        part_bytes = self.shard.cache_shape(1).block_bytes(self.shard.dtype)
        self.block_bytes = part_bytes * self.settings.tensor_parallel
        self.num_blocks = self._num_blocks(part_bytes)
        if self.group is None:
            self.shard.allocate(self.num_blocks)
        else:
            self.group.allocate(self.num_blocks)

    def _num_blocks(self, part_bytes: int) -> int:
        blocks, cache_bytes = self.settings.num_blocks, self.settings.kv_cache_bytes
        if blocks is not None:
            return blocks
        if cache_bytes is not None:
            if cache_bytes < self.block_bytes:
                raise UsageError(
                    f"kv_cache_bytes {cache_bytes} is less than a block of {self.block_bytes} "
                    f"bytes; use {self.block_bytes} or more"
                )
            return cache_bytes // self.block_bytes
        block_size, longest = self.settings.block_size, self.max_model_len
        enough = self.settings.max_sequences * -(-longest // block_size)
        room = self.shard.free_bytes() // part_bytes
        if room < 1:
            raise UsageError("the model leaves no memory for a cache; use a smaller model or dtype")
        return min(enough, room)


def _dtype(asked: str, own: torch.dtype) -> str:
    if asked == "auto":
        return next(name for name, dtype in DTYPES.items() if dtype == own)
    if asked not in DTYPES:
        raise UsageError(f"--dtype {asked} is not possible; use auto, {', '.join(DTYPES)}")
    return asked


def _device(asked: str, processes: int) -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = asked if asked != "auto" else "cuda" if gpus >= processes else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked} is not possible; use auto, cpu or cuda")
    if device == "cuda" and gpus < processes:
        raise UsageError(
            f"--device cuda: {processes} processes need as many GPUs, here are {gpus}; "
            "use --device cpu or a smaller --tensor-parallel"
        )
    return device


def _max_model_len(asked: int | None, possible: int) -> int:
    if asked is None:
        return possible
    if not 1 <= asked <= possible:
        raise UsageError(
            f"--max-model-len {asked} is not possible: the model's positions end at {possible}; "
            f"use 1 to {possible}"
        )
    return asked
