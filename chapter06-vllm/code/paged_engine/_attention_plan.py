"""From the spans of a step to the tensors that attention needs, built once for all layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

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

        def rank(index: int) -> tuple[int, int]:
            span = spans[index]
            if span.length <= max(1, self.kernel_chunk):
                return 0, -span.end
            return (1, span.length) if span.start == 0 else (2, span.length)

        return sorted(range(len(spans)), key=rank)

    def plan(self, spans: Sequence[Span]) -> Plan:
        """The plan of `spans`, which are in the order of `order`."""
        plan = Plan(self._slots(spans).to(self.device))
        short = [span for span in spans if span.length <= max(1, self.kernel_chunk)]
        if short and self.kernel_chunk:
            tables, lengths = self._tables(short)
            plan.tables, plan.lengths = tables.to(self.device), lengths.to(self.device)
        elif short:
            plan.decodes = list(self._decode_groups(short))
        first = sum(span.length for span in short)
        plan.prefills = list(self._prefills(spans[len(short) :], first))
        return plan

    def _slots(self, spans: Sequence[Span]) -> Tensor:
        size = self.shape.block_size
        return torch.tensor(
            [
                span.blocks[position // size] * size + position % size
                for span in spans
                for position in range(span.start, span.end)
            ]
        )

    def _tables(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Of each token, int32: its block table, and how many positions it sees."""
        tables = padded_tables([span.blocks for span in spans], self.shape.blocks)
        lengths = [end for span in spans for end in range(span.start + 1, span.end + 1)]
        if len(lengths) > len(spans):
            counts = torch.tensor([span.length for span in spans])
            tables = tables.repeat_interleave(counts, 0)
        return tables, torch.tensor(lengths, dtype=torch.int32)

    def _decode_groups(self, spans: Sequence[Span]) -> Iterable[Decodes]:
        shape = self.shape
        numbers = 2 * shape.kv_heads * shape.block_size * shape.head_dim  # of a block
        first = 0
        while first < len(spans):
            blocks = -(-spans[first].end // shape.block_size)  # of the longest in the group
            count = max(1, GATHERED_BYTES // (blocks * numbers * self.dtype.itemsize))
            group = spans[first : first + count]
            tables = padded_tables([span.blocks[:blocks] for span in group], shape.blocks)
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


def padded_tables(tables: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Block tables of several sequences [sequences, blocks] int32, short ones filled up."""
    widest = max(len(table) for table in tables)
    padded = [[*table, *[filler] * (widest - len(table))] for table in tables]
    return torch.tensor(padded, dtype=torch.int32)
