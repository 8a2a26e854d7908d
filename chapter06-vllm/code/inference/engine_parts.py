"""Parts of the engine by themselves: a decode step by its CPU operators, and its cache's bytes."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distlab import predict
from distlab.measure import LiveBytes
from distlab.model import SIZES, Llama, ModelConfig, save
from distlab.predict import Architecture
from distlab.script import Run
from paged_engine import kernels
from paged_engine.config import EngineConfig
from paged_engine.runner import ModelRunner

BLOCK_SIZE = 16
EPS = 1e-5
FEW, MANY = 64, 320  # blocks of a cache that is counted
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def weight_shapes(shape: Architecture) -> list[tuple[int, int]]:
    """[out, in] of a layer's four products: queries, keys and values; output; gate, up; down."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    qkv = shape.query_size + 2 * shape.key_value_size
    return [(qkv, hidden), (hidden, shape.query_size), (2 * inner, hidden), (hidden, inner)]


def random_weight(out: int, depth: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(out, depth) / depth**0.5).to(dtype)


class Step:
    """One new token for each of `rows` sequences that hold `context` tokens, the new one counted.

    The cache is of the weights' type. Of the sampler and the tokenizer there is nothing here.
    """

    def __init__(self, shape: Architecture, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.layers = [
            [kernels.pack(random_weight(*size, dtype)) for size in weight_shapes(shape)]
            for _ in range(shape.num_hidden_layers)
        ]
        self.head = kernels.pack(random_weight(shape.vocab_size, shape.hidden_size, dtype))
        self.norm = torch.ones(shape.hidden_size)

    def prepare(self, rows: int, context: int) -> None:
        shape, width = self.shape, -(-context // BLOCK_SIZE)
        blocks = (rows * width, shape.num_key_value_heads, BLOCK_SIZE, shape.head_dim)
        self.caches = [
            (torch.randn(blocks).to(self.dtype), torch.randn(blocks).to(self.dtype))
            for _ in range(shape.num_hidden_layers)
        ]
        self.tables = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
        self.lengths = torch.full((rows,), context, dtype=torch.int32)
        last = (context - 1) % BLOCK_SIZE
        self.slots = self.tables[:, -1].long() * BLOCK_SIZE + last
        angles = torch.randn(rows, shape.head_dim // 2)
        self.turns = angles.cos(), angles.sin()
        self.embedded = torch.randn(rows, shape.hidden_size)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Logits [rows, vocab]."""
        x, added = self.embedded.clone(), None
        for layer, caches in zip(self.layers, self.caches, strict=True):
            added = self._layer(layer, caches, x, added)
        return self.head(kernels.rms_norm(x, self.norm, EPS, added))

    def _layer(
        self,
        layer: list[kernels.Product],
        caches: tuple[Tensor, Tensor],
        x: Tensor,
        added: Tensor | None,
    ) -> Tensor:
        """What joins `x` [rows, hidden] after the layer; `added` joins it before, in place."""
        qkv_product, output, gate_up, down = layer
        heads, head_dim = self.shape.num_attention_heads, self.shape.head_dim
        qkv = qkv_product(kernels.rms_norm(x, self.norm, EPS, added))
        qkv = qkv.unflatten(-1, (-1, head_dim))  # [rows, heads + 2 kv_heads, head_dim]
        kernels.rotate_and_store(qkv, *self.turns, self.slots, *caches)
        attended = kernels.paged_decode_attention(
            qkv[:, :heads], *caches, self.tables, self.lengths, head_dim**-0.5
        )
        joined = output(attended.flatten(1))
        normed = kernels.rms_norm(x, self.norm, EPS, joined)
        return down(kernels.silu_mul(gate_up(normed)))


def check_cache(run: Run, size: str, block_size: int) -> None:
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
                few, many = (allocated(model, dtype, n, block_size) for n in (FEW, MANY))
                measured[key] = (many[0] - few[0]) / (MANY - FEW)
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
    config = EngineConfig(model, dtype=dtype, num_blocks=blocks, block_size=block_size)
    with LiveBytes() as live:
        runner = ModelRunner(config)
    try:
        return live.bytes, runner.block_bytes
    finally:
        runner.close()
