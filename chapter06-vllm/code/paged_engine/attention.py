"""Attention over a paged cache: any mix of prefill chunks and decodes in one step.

The cache of a layer is [2, blocks, kv_heads, block_size, head_dim], keys first. Who computes:

- Decodes and short chunks, token by token, reading the block tables: the compiled kernel on a CPU
  (`kernels.paged_decode_attention`), Triton's on CUDA (`attention_triton`).
- Decodes in plain torch, where neither is there: sequences of similar length are gathered together,
  a few at a time, so that what is gathered is still in the processor's cache when the two products
  read it. A block of one head is contiguous, so that the gathered blocks of a table are a matrix
  [tokens, head_dim]; the query heads that share a key head are the rows of one product with it.
- Long chunks: torch's fused attention. From a prompt's start the keys and values are there
  already; a chunk with a context (of a long prompt, after a cached prefix) gathers it first.

A step's spans become, once for all layers, the tensors that attention needs (`Planner`).

Source of paging: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from paged_engine import kernels
from paged_engine.native import choice

GATHERED_BYTES = 1 << 20  # of one group of decodes: about what a core's second-level cache holds
COMPILED_CHUNK = 64  # the compiled kernel's longest chunk: beyond it torch's fused one is faster


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
            from paged_engine import attention_triton

            self.kernel = attention_triton.paged_decode_attention

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), as if one after the other."""
        if not {source for source, _ in pairs} & {target for _, target in pairs}:
            sources, targets = zip(*pairs, strict=True)
            self.data[:, :, list(targets)] = self.data[:, :, list(sources)]
            return
        for source, target in pairs:
            self.data[:, :, target] = self.data[:, :, source]

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A copy of whole blocks [blocks, layers, 2, kv_heads, block_size, head_dim]."""
        return self.data[:, :, list(blocks)].movedim(2, 0).contiguous()

    def write(self, blocks: Sequence[int], contents: Tensor) -> None:
        """Put back what `read` gave, here or in another process."""
        self.data[:, :, list(blocks)] = contents.to(self.device).movedim(0, 2)

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


@dataclass(frozen=True)
class Planner:
    """Plans the steps of one process.

    `dtype` is that of the queries. `kernel_chunk`: chunks of at most so many tokens are left to a
    kernel that reads the block tables (`COMPILED_CHUNK` on a CPU, 1 for Triton's; 0: there is no
    kernel).
    """

    shape: CacheShape
    dtype: torch.dtype
    device: torch.device
    kernel_chunk: int

    def order(self, spans: Sequence[Span]) -> list[int]:
        """The order in which a step's spans are computed.

        Decodes and chunks for the kernel first, the longest contexts first, so that neighbours are
        of similar length; then the chunks from a prompt's start, equal lengths together; then
        those with a context.
        """

        short = max(1, self.kernel_chunk)
        ranks = [
            (0, -span.end) if span.length <= short else (1 if span.start == 0 else 2, span.length)
            for span in spans
        ]
        return sorted(range(len(spans)), key=ranks.__getitem__)

    def slots(self, spans: Sequence[Span]) -> list[int]:
        """Where each token's key and value go: block * block_size + place."""
        size = self.shape.block_size
        return [
            blocks[position // size] * size + position % size
            for start, length, blocks in spans
            for position in range(start, start + length)
        ]

    def plan(self, spans: Sequence[Span], slots: Tensor) -> Plan:
        """The plan of `spans`, which are in the order of `order`; `slots`, on the device."""
        plan = Plan(slots)
        short = [span for span in spans if span.length <= max(1, self.kernel_chunk)]
        if short and self.kernel_chunk:
            plan.tables, plan.lengths = self._tables(short)
        elif short:
            plan.decodes = list(self._decode_groups(short))
        first = sum(span.length for span in short)
        plan.prefills = list(self._prefills(spans[len(short) :], first))
        return plan

    def _tables(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Of each token, int32 on the device: its block table, how many positions it sees."""
        filled = padded([span.blocks for span in spans], self.shape.blocks)
        ends = [end for span in spans for end in range(span.start + 1, span.end + 1)]
        flat, lengths = moved([filled, ends], np.int32, self.device)
        tables = flat.view(len(spans), -1)
        if len(ends) > len(spans):
            counts = torch.tensor([span.length for span in spans], device=self.device)
            tables = tables.repeat_interleave(counts, 0)
        return tables, lengths

    def _decode_groups(self, spans: Sequence[Span]) -> Iterable[Decodes]:
        shape = self.shape
        numbers = 2 * shape.kv_heads * shape.block_size * shape.head_dim  # of a block
        first = 0
        while first < len(spans):
            blocks = -(-spans[first].end // shape.block_size)  # of the longest in the group
            count = max(1, GATHERED_BYTES // (blocks * numbers * self.dtype.itemsize))
            group = spans[first : first + count]
            filled = padded([span.blocks[:blocks] for span in group], shape.blocks)
            tables = torch.tensor(filled).view(len(group), -1)
            ends = torch.tensor([span.end for span in group])
            hidden = torch.arange(blocks * shape.block_size) >= ends[:, None]
            hidden = hidden.repeat_interleave(shape.kv_heads, 0)[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            rows = self._rows(tables)
            yield Decodes(first, len(group), rows.to(self.device), mask.to(self.device))
            first += len(group)

    def _rows(self, tables: Tensor) -> Tensor:
        """Rows [2 * sequences * kv_heads * blocks] of `tables` in [2 * blocks * kv_heads]."""
        heads = torch.arange(self.shape.kv_heads)
        both = torch.stack([heads, heads + (self.shape.blocks + 1) * self.shape.kv_heads])
        of_heads = tables.long()[None, :, None] * self.shape.kv_heads + both[:, None, :, None]
        return of_heads.flatten()

    def _prefills(self, spans: Sequence[Span], first: int) -> Iterable[Prefills]:
        for (fresh, length), group in groupby(spans, key=lambda s: (s.start == 0, s.length)):
            members = list(group)
            if fresh:
                yield Prefills(first, len(members), length)
                first += len(members) * length
                continue
            for span in members:
                blocks = span.blocks[: -(-span.end // self.shape.block_size)]
                rows = self._rows(torch.tensor([list(blocks)]))
                mask = torch.full((length, span.end), -torch.inf, dtype=self.dtype)
                mask = mask.triu_(span.start + 1)
                yield Prefills(
                    first, 1, length, rows.to(self.device), mask.to(self.device), span.end
                )
                first += length


def padded(tables: Sequence[Sequence[int]], filler: int) -> list[int]:
    """Block tables of several sequences, one after the other, all as long as the longest."""
    filling = [filler] * max(map(len, tables))
    return [block for table in tables for block in (*table, *filling[len(table) :])]


def moved(
    lists: Sequence[Sequence[int]], dtype: type[np.integer], device: torch.device
) -> tuple[Tensor, ...]:
    """A tensor on the device for each list; to a GPU they go together, in one copy."""
    arrays = [np.array(one, dtype) for one in lists]
    if device.type == "cpu":
        return tuple(torch.from_numpy(array) for array in arrays)
    joined = torch.from_numpy(np.concatenate(arrays)).to(device)
    return joined.split([len(array) for array in arrays])
