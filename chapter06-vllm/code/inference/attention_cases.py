"""Sequences in scattered blocks, dense attention on them, and what paged attention read."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlab.measure import Timing
from distlab.script import Run


@dataclass(frozen=True)
class Batch:
    """Sequences of which the newest tokens attend, the longest first.

    Each of `keys` and `values` is [tokens, kv_heads, head_dim], as a cache without paging holds it;
    `queries` [batch, new, heads, head_dim], `tables` [batch, blocks], and starts[i] is the position
    of sequence i's first query.
    """

    queries: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    tables: Tensor
    starts: list[int]
    pool_blocks: int

    @property
    def dtype(self) -> torch.dtype:
        return self.queries.dtype

    def padded_step(self) -> Callable[[], Tensor]:
        """One decode step of dense attention on the batch, padded to its longest sequence."""
        lengths = torch.tensor([len(keys) for keys in self.keys], device=self.queries.device)
        keys, values = (
            torch.nn.utils.rnn.pad_sequence(each, batch_first=True).transpose(1, 2).contiguous()
            for each in (self.keys, self.values)
        )  # [batch, kv_heads, longest, head_dim]
        hidden = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
        return partial(padded_attention, self.queries, keys, values, hidden[:, None, None])


def padded_attention(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Attention of one query token a sequence, [batch, 1, heads, head_dim].

    Two batched products with the groups' heads as rows: torch's fused attention call, made for many
    queries, is slower for a single one on a CPU.
    """
    batch, _, heads, head_dim = queries.shape
    rows = queries.view(batch, keys.shape[1], -1, head_dim) / head_dim**0.5
    scores = (rows @ keys.mT).float().masked_fill_(hidden, -torch.inf)
    attended = torch.softmax(scores, -1).to(values.dtype) @ values
    return attended.view(batch, 1, heads, head_dim)


def dense(batch: Batch) -> Tensor:
    """Plain causal attention in float64, sequence by sequence, on keys that were never paged."""
    outputs = []
    for queries, keys, values, start in zip(
        batch.queries.double(), batch.keys, batch.values, batch.starts, strict=True
    ):
        group = queries.shape[1] // keys.shape[1]
        wide, passed = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, wide) / queries.shape[2] ** 0.5
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(start + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, passed))
    return torch.stack(outputs).float()


def cases(args: Namespace) -> Iterator[tuple[str, Batch, int]]:
    """What the kernel must do: its name, the sequences, and the block size."""
    size = args.block_size
    mixed = [5 * size, 3 * size + 1, 2 * size, max(1, size - 1), 1]
    yield "decode, mixed lengths", filled(args, mixed, size), size
    yield "decode, blocks of one token", filled(args, [37, 16, 1], 1), 1
    yield "decode, blocks of 7 tokens", filled(args, [37, 14, 13, 1], 7), 7
    yield "prefill of whole prompts", filled(args, [2 * size + 3] * 2, size, new=2 * size + 3), size
    yield "a chunk after cached tokens", filled(args, [4 * size + 5, 3 * size], size, new=9), size
    yield "sequences that share a prefix", sharing(args, size), size
    for kv_heads in sorted({1, args.heads}):
        other = Namespace(**{**vars(args), "kv_heads": kv_heads})
        label = f"{args.heads} heads on {kv_heads}"
        yield f"decode, query and key-value heads {label}", filled(other, mixed, size), size


def filled(
    args: Namespace,
    lengths: list[int],
    block_size: int,
    dtype: torch.dtype = torch.float32,
    new: int = 1,
) -> Batch:
    """Random sequences of `lengths`, their blocks scattered over a pool twice as large as needed.

    The last `new` tokens of each attend, or all of a shorter one's.
    """
    generator = torch.Generator().manual_seed(args.seed)
    lengths = sorted(lengths, reverse=True)
    counts = [-(-length // block_size) for length in lengths]
    free = torch.randperm(2 * sum(counts), generator=generator)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.long)
    for table, blocks in zip(tables, free[: sum(counts)].split(counts), strict=True):
        table[: len(blocks)] = blocks
    place = {"device": args.device, "dtype": dtype}
    shape = (args.kv_heads, args.head_dim)
    keys, values = (
        [torch.randn(length, *shape, generator=generator).to(**place) for length in lengths]
        for _ in range(2)
    )
    queries = torch.randn(len(lengths), new, args.heads, args.head_dim, generator=generator)
    starts = [length - new for length in lengths]
    return Batch(queries.to(**place), keys, values, tables.to(args.device), starts, len(free))


def sharing(args: Namespace, block_size: int) -> Batch:
    """Two sequences whose first two blocks are the same blocks; their ends differ."""
    batch = filled(args, [4 * block_size + 1, 3 * block_size - 1], block_size)
    shared = slice(0, 2 * block_size)
    batch.tables[1, :2] = batch.tables[0, :2]
    for stored in (batch.keys, batch.values):
        stored[1][shared] = stored[0][shared]
    return batch


def draw_lengths(args: Namespace) -> list[int]:
    """Mixed lengths from 1 to --longest, the longest among them: lognormal, most are short."""
    drawn = np.random.default_rng(args.seed).lognormal(np.log(args.longest / 6), 0.9, args.batch)
    lengths = np.clip(drawn, 1, args.longest).astype(int).tolist()
    return sorted([args.longest, *lengths[1:]], reverse=True)


class _Gathered(TorchDispatchMode):
    """Sums the bytes of what index_select takes out, as torch dispatches it."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.bytes += output.nbytes
        return output


def gathered_bytes(function: Callable[[], Tensor]) -> int:
    with _Gathered() as seen:
        function()
    return seen.bytes


def show_times(
    run: Run, timings: Mapping[str, Timing], tokens: Mapping[str, tuple[int, int]]
) -> None:
    """`timings` of "mix, way", and for each mix the tokens that a padded batch and a paged read."""
    rows, ratios, padding = [], {}, {}
    for mix, (padded, real) in tokens.items():
        dense, paged = timings[f"{mix}, dense"].median, timings[f"{mix}, paged"].median
        ratios[mix], padding[mix] = dense / paged, padded / real
        rows.append([mix, padded, real, padding[mix], 1e3 * dense, 1e3 * paged, ratios[mix]])
    run.table(
        "times",
        ["lengths", "padded tokens", "tokens", "padding", "dense ms", "paged ms", "dense / paged"],
        rows,
        caption="One decode step of one layer",
    )
    run.compare(
        "dense over paged at mixed lengths, from the padding and the price at equal lengths",
        ratios["equal"] * padding["mixed"], ratios["mixed"],
    )  # fmt: skip
