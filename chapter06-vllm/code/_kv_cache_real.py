"""kv_cache_math.py's check: a small model, loaded by paged_engine, and what its cache allocates."""

import tempfile
from dataclasses import replace
from pathlib import Path

from distlab import predict
from distlab.measure import LiveBytes
from distlab.model import SIZES, Llama, ModelConfig, save
from distlab.script import Run

BLOCKS = (64, 320)
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def verify(run: Run, size: str, block_size: int) -> None:
    """Every shape and type of cache: the bytes of 256 blocks more, against the formula."""
    base = SIZES[size]
    shapes = {
        "grouped heads": base,
        "one key-value head": replace(base, num_key_value_heads=1),
        "all heads": replace(base, num_key_value_heads=base.num_attention_heads),
    }
    predicted, measured, told = {}, {}, {}
    for shape, config in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            model = str(save(Llama(config), Path(folder) / "model"))
            for dtype, name in DTYPES.items():
                key = f"{shape}, {dtype}"
                few, many = (allocated(model, dtype, n, block_size) for n in BLOCKS)
                measured[key] = (many[0] - few[0]) / (BLOCKS[1] - BLOCKS[0])
                told[key] = many[1]
                predicted[key] = block_bytes(config, name, block_size)
    run.check_equal("a block of paged_engine's cache has the formula's bytes", measured, predicted)
    run.check_equal("and the engine says so itself", told, predicted)
    key = f"grouped heads, {next(iter(DTYPES))}"
    run.compare(f"one block, {key}", predicted[key], measured[key], "B")


def block_bytes(config: ModelConfig, dtype: str, block_size: int) -> float:
    return block_size * predict.kv_bytes_per_token(config.architecture, dtype)


def allocated(model: str, dtype: str, blocks: int, block_size: int) -> tuple[int, int]:
    """Bytes of all tensors that live once a runner with `blocks` blocks is built, and the bytes
    that it tells for a block. Two such counts differ by the cache alone: the weights are the same.
    """
    from paged_engine.config import EngineConfig
    from paged_engine.runner import ModelRunner

    config = EngineConfig(model, dtype=dtype, num_blocks=blocks, block_size=block_size)

    with LiveBytes() as live:
        runner = ModelRunner(config)
    try:
        return live.bytes, runner.block_bytes
    finally:
        runner.close()
