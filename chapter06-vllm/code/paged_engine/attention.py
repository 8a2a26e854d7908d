"""Attention over a paged cache: any mix of prefill chunks and decodes in one step.

The cache of a layer is [2, blocks, kv_heads, block_size, head_dim], keys first. Who computes:

- Decodes and short chunks, token by token, reading the block tables: the compiled kernel on a CPU
  (`kernels.paged_decode_attention`), Triton's on CUDA (`_attention_triton`).
- Decodes in plain torch, where neither is there: sequences of similar length are gathered together,
  a few at a time, so that what is gathered is still in the processor's cache when the two products
  read it. A block of one head is contiguous, so that the gathered blocks of a table are a matrix
  [tokens, head_dim]; the query heads that share a key head are the rows of one product with it.
- Long chunks: torch's fused attention. From a prompt's start the keys and values are there
  already; a chunk with a context (of a long prompt, after a cached prefix) gathers it first.

Source of paging: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from paged_engine import kernels
from paged_engine._kernels_build import choice


class Span(NamedTuple):
    """What one sequence computes in a step: tokens [start, start + length), and its blocks."""

    start: int
    length: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class CacheShape:
    """The sizes of the cache that one process holds; block number `blocks` is scratch."""

    layers: int
    blocks: int
    kv_heads: int
    block_size: int
    head_dim: int

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block, keys and values, over all layers."""
        numbers = 2 * self.layers * self.kv_heads * self.block_size * self.head_dim
        return numbers * dtype.itemsize


@dataclass
class Decodes:
    """Sequences of similar length that decode together: queries [first, first + count)."""

    first: int
    count: int
    rows: Tensor  # [2 * count * kv_heads * blocks]: what to gather, of [2 * blocks * kv_heads]
    mask: Tensor  # [count * kv_heads, 1, tokens]: 0, or -inf past a sequence's end


@dataclass
class Prefills:
    """`count` chunks of `length` tokens each, from query `first` on; with a context, one chunk."""

    first: int
    count: int
    length: int
    rows: Tensor | None = None  # [2 * kv_heads * blocks], where there is a context
    mask: Tensor | None = None  # [length, tokens]
    tokens: int = 0  # context and chunk


@dataclass
class Plan:
    """All that the layers' attention has in common in one step: queries in this order."""

    slots: Tensor  # [tokens] int64, block * block_size + place: where new keys and values go
    tables: Tensor | None = None  # [queries, blocks] and
    lengths: Tensor | None = None  # [queries], int32: for a kernel that reads the tables itself
    decodes: list[Decodes] = field(default_factory=list)  # in plain torch
    prefills: list[Prefills] = field(default_factory=list)


def has_gpu_kernel(device: torch.device) -> bool:
    """Whether decodes on `device` are Triton's: a GPU that it knows, and nothing forbids it."""
    return device.type == "cuda" and has_triton() and choice() != "torch"


class PagedCache:
    """Keys and values of all layers, and attention over them.

    It is zeroed, since plain torch multiplies what is masked out too, by 0.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        sizes = (2, shape.blocks + 1, shape.kv_heads, shape.block_size, shape.head_dim)
        self.data = torch.zeros((shape.layers, *sizes), dtype=dtype, device=device)
        self.keys, self.values = list(self.data[:, 0]), list(self.data[:, 1])  # of each layer
        self.blocks_of_heads = list(
            self.data.view(shape.layers, -1, shape.block_size * shape.head_dim)
        )
        self.gathered = self.data.new_empty(0)
        self.scale = shape.head_dim**-0.5
        self.kernel = kernels.paged_decode_attention
        if has_gpu_kernel(device):
            from paged_engine import _attention_triton

            self.kernel = _attention_triton.paged_decode_attention

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), as if one after the other."""
        if not {source for source, _ in pairs} & {target for _, target in pairs}:
            sources, targets = zip(*pairs, strict=True)
            self.data[:, :, list(targets)] = self.data[:, :, list(sources)]
            return
        for source, target in pairs:
            self.data[:, :, target] = self.data[:, :, source]

    def attend(self, layer: int, qkv: Tensor, plan: Plan) -> Tensor:
        """Attention's output [tokens, heads * head_dim].

        `qkv` [tokens, heads + 2 * kv_heads, head_dim], rotated; its keys and values are stored.
        """
        heads = qkv.shape[1] - 2 * self.shape.kv_heads
        queries, new = qkv[:, :heads], qkv[:, heads:]
        if not plan.prefills and not plan.decodes:
            return self._by_kernel(layer, queries, plan).flatten(1)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        if plan.tables is not None:
            out[: len(plan.tables)] = self._by_kernel(layer, queries, plan)
        for group in plan.decodes:
            self._decode(layer, queries, group, out)
        for chunks in plan.prefills:
            self._prefill(layer, queries, new, chunks, out)
        return out.flatten(1)

    def _by_kernel(self, layer: int, queries: Tensor, plan: Plan) -> Tensor:
        assert plan.tables is not None and plan.lengths is not None
        return self.kernel(
            queries[: len(plan.tables)],
            self.keys[layer],
            self.values[layer],
            plan.tables,
            plan.lengths,
            self.scale,
        )

    def _decode(self, layer: int, queries: Tensor, group: Decodes, out: Tensor) -> None:
        some = slice(group.first, group.first + group.count)
        pairs = group.count * self.shape.kv_heads  # (sequence, key head)
        gathered = self._gather(layer, group.rows, queries.dtype)
        keys, values = gathered.view(2, pairs, -1, self.shape.head_dim)
        q = queries[some].reshape(pairs, -1, self.shape.head_dim)
        scores = torch.baddbmm(group.mask, q, keys.transpose(1, 2), alpha=self.scale)
        torch.bmm(scores.softmax(-1), values, out=out[some].view(q.shape))

    def _prefill(
        self, layer: int, queries: Tensor, new: Tensor, chunks: Prefills, out: Tensor
    ) -> None:
        kv_heads = self.shape.kv_heads
        some = slice(chunks.first, chunks.first + chunks.count * chunks.length)
        q = queries[some].unflatten(0, (chunks.count, -1)).transpose(1, 2)
        if chunks.rows is None:
            fresh = new[some].unflatten(0, (chunks.count, -1)).transpose(1, 2)
            # [chunks, kv_heads, length, head_dim], rounded as a later step will read them
            keys, values = fresh.to(self.data.dtype).to(q.dtype).split(kv_heads, dim=1)
        else:
            read = self._gather(layer, chunks.rows, q.dtype)
            read = read.view(2, 1, kv_heads, -1, self.shape.head_dim)
            keys, values = read[:, :, :, : chunks.tokens]
        if q.is_cuda and q.dtype == torch.float32:
            # CUDA's fused float32 kernel knows no groups, and the unfused one stores all scores
            group = q.shape[1] // kv_heads
            keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        attended = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=chunks.mask,
            is_causal=chunks.rows is None and chunks.length > 1,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        out[some] = attended.transpose(1, 2).flatten(0, 1)

    def _gather(self, layer: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of single heads, one after the other; the buffer is used again by the next."""
        source = self.blocks_of_heads[layer]
        size = rows.numel() * source.shape[1]
        if self.gathered.numel() < size:
            self.gathered = self.data.new_empty(size)
        buffer = self.gathered[:size].view(-1, source.shape[1])
        return torch.index_select(source, 0, rows, out=buffer).to(dtype)
