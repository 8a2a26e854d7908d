"""Paged attention in plain torch: the kernel that reads a sequence's cache through a block table.

The keys and values of all sequences lie in one pool of blocks of B tokens. A sequence owns a list
of block numbers, its block table, as a process owns pages: the token at position p lies in the slot
table[p // B] · B + p % B. So the blocks may lie anywhere in the pool, two sequences with the same
beginning may name the same blocks, and no more is wasted than the end of each last block.
Attention reads the blocks one after the other and never needs all scores at once, since a softmax
can be computed online: a running maximum, sum and output are rescaled as each block arrives.

Run:
    python chapter06-vllm/code/paged_attention.py
    python chapter06-vllm/code/paged_attention.py --block-size 32 --blocks-at-once 1 --batch 64

You should see: the paged result equals dense attention to rounding, for every length, in a decode
step and in a chunk of a prompt that follows cached tokens; what other sequences left in the pool is
never seen; the bytes read are those of the formula, the sum over sequences of ceil(length / B) · B
tokens. Dense attention on a padded batch reads batch · longest tokens instead. At equal lengths
nothing is padded, and paging has only its price, the gathering; it wins as the lengths differ.

Sources: Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention" (arXiv
2309.06180), sections 4.1 and 5.1; online softmax: Milakov and Gimelshein (arXiv 1805.02867).
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distlab import hardware, measure, script
from distlab.script import Run, UsageError
from inference.attention_cases import (
    Batch,
    cases,
    dense,
    draw_lengths,
    filled,
    gathered_bytes,
    show_times,
)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"heads": 4, "kv_heads": 2, "head_dim": 16, "batch": 4, "longest": 256,
              "repeats": 3},
    "laptop": {"heads": 9, "kv_heads": 3, "head_dim": 64, "batch": 32, "longest": 2048,
               "repeats": 9},
    "gpu": {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 64, "longest": 4096,
            "repeats": 15, "dtype": "bfloat16", "blocks_at_once": 64},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        prove_equal(run, args)
        count_bytes(run, args)
        compare_times(run, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--block-size", **positive, default=16, help="tokens in a block")
    parser.add_argument("--blocks-at-once", **positive, default=16, help="gathered in one step")
    parser.add_argument("--heads", **positive, help="of the queries")
    parser.add_argument("--kv-heads", **positive, help="of the keys and values")
    parser.add_argument("--head-dim", **positive)
    parser.add_argument("--batch", **positive, help="sequences in the timed decode step")
    parser.add_argument("--longest", **positive, help="tokens of the longest of them")
    parser.add_argument("--repeats", **positive, help="timed runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the timed runs; the proofs are in float32")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if args.heads % args.kv_heads:
        raise UsageError(
            f"--kv-heads {args.kv_heads} does not divide --heads {args.heads}; "
            f"use a divisor, such as {math.gcd(args.heads, args.kv_heads)}"
        )
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    args.device = hardware.chosen_device(args.device)
    return args


@dataclass(frozen=True)
class Pool:
    """The cache of one layer: `keys` and `values` are [kv_heads, blocks, block_size, head_dim].

    With the heads first, what is gathered of a head is a matrix that a product takes as it is.
    Whatever lies in a slot must be finite, even where no token was written: a masked score gives
    the weight 0, and 0 · NaN is NaN. So a real pool starts with zeros, not with torch.empty.
    """

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [tokens, kv_heads, head_dim] in the given slots [tokens]."""
        self.keys.flatten(1, 2)[:, slots] = keys.transpose(0, 1)
        self.values.flatten(1, 2)[:, slots] = values.transpose(0, 1)

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, batch, tokens, head_dim] in `blocks` [batch, count]."""
        keys, values = (
            stored.index_select(1, blocks.flatten()).unflatten(1, blocks.shape).flatten(2, 3)
            for stored in (self.keys, self.values)
        )
        return keys, values


def slots(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Where the tokens at `positions` of the sequence with this block table lie in the pool."""
    return table[positions // block_size] * block_size + positions % block_size


def paged_attention(
    queries: Tensor, pool: Pool, tables: Tensor, starts: list[int], blocks_at_once: int = 1
) -> Tensor:
    """Causal attention of the newest tokens of each sequence on all tokens up to themselves.

    `queries` [batch, new, heads, head_dim] are the tokens at starts[i], starts[i] + 1, … of
    sequence i, whose keys and values are in the pool already: new is 1 when decoding, and a chunk
    of a prompt when prefilling. `tables` [batch, blocks], the longest sequence first; entries
    beyond a sequence's own blocks may be any block. Returns [batch, new, heads, head_dim].
    """
    batch, new, heads, head_dim = queries.shape
    kv_heads, device = pool.keys.shape[0], queries.device
    # The query heads of a group share a key-value head, so they are rows of the same product.
    rows = queries.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4).flatten(2, 3)
    rows = rows / head_dim**0.5  # [kv_heads, batch, group · new, head_dim]
    own = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)
    own = own.repeat(1, heads // kv_heads)[:, :, None]  # the position of each row's query
    peak = torch.full_like(rows[..., :1], -math.inf, dtype=torch.float32)
    total, output = torch.zeros_like(peak), torch.zeros_like(rows, dtype=torch.float32)

    step = blocks_at_once * pool.block_size  # tokens of each sequence that one round reads
    for begin in range(0, max(starts) + new, step):
        active = sum(start + new > begin for start in starts)  # the longest come first
        first = begin // pool.block_size
        keys, values = pool.gather(tables[:active, first : first + blocks_at_once])
        positions = begin + torch.arange(keys.shape[2], device=device)
        scores = (rows[:, :active] @ keys.mT).float()
        scores.masked_fill_(positions > own[:active], -math.inf)
        highest = torch.maximum(peak[:, :active], scores.amax(-1, keepdim=True))
        rescale = torch.exp(peak[:, :active] - highest)  # 0 in the first round
        weights = torch.exp(scores - highest)
        attended = (weights.to(values.dtype) @ values).float()
        peak[:, :active] = highest
        total[:, :active] = total[:, :active] * rescale + weights.sum(-1, keepdim=True)
        output[:, :active] = output[:, :active] * rescale + attended
    rows = (output / total).to(queries.dtype).unflatten(2, (-1, new))
    return rows.permute(1, 3, 0, 2, 4).flatten(2, 3)


def store(args: Namespace, batch: Batch, block_size: int) -> Pool:
    """A pool that holds the batch, written token by token through its block tables.

    It is full of what other requests left: numbers so large that seeing one would be noticed.
    """
    kv_heads, head_dim = batch.keys[0].shape[1:]
    shape = (kv_heads, batch.pool_blocks, block_size, head_dim)
    pool = Pool(*(torch.full(shape, 1e4, device=args.device, dtype=batch.dtype) for _ in range(2)))
    for table, keys, values in zip(batch.tables, batch.keys, batch.values, strict=True):
        positions = torch.arange(len(keys), device=args.device)
        pool.write(slots(table, positions, block_size), keys, values)
    return pool


def prove_equal(run: Run, args: Namespace) -> None:
    """Every case, one block at a time and several at once, against dense attention in float64."""
    for name, batch, block_size in cases(args):
        pool = store(args, batch, block_size)
        attended = {
            f"{count} at once": paged_attention(
                batch.queries, pool, batch.tables, batch.starts, count
            )
            for count in (1, args.blocks_at_once)
        }
        expected = dense(batch)
        run.check_close(f"paged equals dense: {name}", attended, dict.fromkeys(attended, expected),
                        tolerance=1e-5)  # fmt: skip


def count_bytes(run: Run, args: Namespace) -> None:
    """The bytes that torch's operators gather from the pool, against the formula."""
    batch = filled(args, draw_lengths(args), args.block_size, torch.float32)
    pool = store(args, batch, args.block_size)
    token = 2 * args.kv_heads * args.head_dim * 4  # keys and values of one token, float32
    lengths = [start + 1 for start in batch.starts]
    whole = sum(math.ceil(length / args.block_size) * args.block_size for length in lengths)
    once = partial(paged_attention, batch.queries, pool, batch.tables, batch.starts)
    run.check_equal("bytes read are those of the blocks", gathered_bytes(once), whole * token)
    run.metric("read", whole * token, "B", "in one decode step of mixed lengths")
    run.compare(
        "bytes beyond the tokens' own, (block size - 1) / 2 for each sequence",
        len(lengths) * (args.block_size - 1) / 2 * token,
        (whole - sum(lengths)) * token, "B",
    )  # fmt: skip
    run.metric("padded", len(lengths) * max(lengths) * token, "B", "what a padded batch reads")


def compare_times(run: Run, args: Namespace) -> None:
    """A decode step, paged and dense on a padded batch, at equal and at mixed lengths, in turns.

    At equal lengths the ratio of the two is the price of gathering; with it the ratio at mixed
    lengths is predicted from the bytes alone.
    """
    dtype = getattr(torch, args.dtype)
    mixes = {"equal": [args.longest] * args.batch, "mixed": draw_lengths(args)}
    steps: dict[str, Callable[[], Tensor]] = {}
    tokens = {}
    for name, lengths in mixes.items():
        batch = filled(args, lengths, args.block_size, dtype)
        pool = store(args, batch, args.block_size)
        steps[f"{name}, dense"] = batch.padded_step()
        steps[f"{name}, paged"] = partial(
            paged_attention, batch.queries, pool, batch.tables, batch.starts, args.blocks_at_once
        )
        tokens[name] = (args.batch * max(lengths), sum(lengths))
        run.check_close(
            f"{name} lengths: the two that are timed agree", steps[f"{name}, paged"]().float(),
            steps[f"{name}, dense"]().float(), 1e-5 if dtype == torch.float32 else 2e-2,
            relative=True,
        )  # fmt: skip
    show_times(run, measure.compare(steps, 2, args.repeats, args.device), tokens)


if __name__ == "__main__":
    script.exit(main)
