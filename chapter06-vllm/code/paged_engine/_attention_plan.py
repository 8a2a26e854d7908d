"""From the spans of a step to the tensors that attention needs, built once for all layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from paged_engine.attention import CacheShape, Decodes, Plan, Prefills, Span

GATHERED_BYTES = 1 << 20  # of one group of decodes: about what a core's second-level cache holds
COMPILED_CHUNK = 64  # the compiled kernel's longest chunk: beyond it torch's fused one is faster


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
