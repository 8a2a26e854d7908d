"""A decode step of a whole model with random weights, by the engine's CPU operators alone."""

import torch
from paged_engine import kernels
from torch import Tensor

from distlab.predict import Architecture

BLOCK_SIZE = 16
EPS = 1e-5


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
            [torch.randn(blocks).to(self.dtype) for _ in "kv"]
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

    def _layer(self, layer: list, caches: list, x: Tensor, added: Tensor | None) -> Tensor:
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
