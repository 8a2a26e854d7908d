"""Attention of single tokens over the paged cache on CUDA: one Triton kernel, and one that joins.

Few sequences would leave most of a GPU idle, so that a context is cut into parts which different
programs read at the same time, and their outputs are joined by the sums of their softmaxes (Dao et
al. 2023, "Flash-Decoding for long-context inference"). A program takes all the query heads that
share a key head: keys and values are read once for them. How many parts there are depends on the
number of tokens alone, not on the lengths, so that a CUDA graph can be replayed at any length.
"""

# mypy: disable-error-code=no-untyped-def

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # positions at a time
PROGRAMS = 512  # at least so many are started, if the context has as many parts
MOST_PARTS = 32
SMALLEST_DOT = 16  # rows of a product in Triton


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """As `kernels.paged_decode_attention`, for float32, bfloat16 or float16 on CUDA.

    Lengths are 1 or more. Head dimensions need not be powers of two; they are padded by masks.
    """
    tokens, heads, head_dim = query.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    parts = max(1, min(MOST_PARTS, -(-PROGRAMS // (tokens * kv_heads))))
    partial = query.new_empty(tokens, heads, parts, head_dim, dtype=torch.float32)
    sums = query.new_empty(tokens, heads, parts, dtype=torch.float32)
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    width = triton.next_power_of_2(head_dim)
    _attend[(tokens, kv_heads, parts)](
        query, k_cache, v_cache, block_tables, lengths, partial, sums,
        query.stride(0), block_tables.stride(0), k_cache.stride(0), k_cache.stride(1), scale,
        GROUP=group, ROWS=max(SMALLEST_DOT, triton.next_power_of_2(group)), DIM=head_dim,
        WIDTH=width, BLOCK=block_size, PARTS=parts, POSITIONS=TILE,
        PRECISE=query.dtype == torch.float32,
    )  # fmt: skip
    _join[(tokens, heads)](
        partial, sums, out, DIM=head_dim, WIDTH=width, PARTS=parts,
        SLOTS=triton.next_power_of_2(parts),
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    query, k_cache, v_cache, tables, lengths, partial, sums,
    query_stride, table_stride, block_stride, head_stride, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, POSITIONS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One part of one token's context, for the query heads that share one key head."""
    token, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    precision: tl.constexpr = "ieee" if PRECISE else "tf32"
    length = tl.load(lengths + token)
    each = tl.cdiv(tl.cdiv(length, PARTS), POSITIONS) * POSITIONS  # positions of a part
    begin = part * each
    end = tl.minimum(begin + each, length)
    rows, dims, places = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, POSITIONS)
    heads = kv_head * GROUP + rows
    wanted = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(
        query + token * query_stride + heads[:, None] * DIM + dims[None, :], mask=wanted, other=0.0
    )
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(begin, end, POSITIONS):
        at = first + places
        seen = at < end
        block = tl.load(tables + token * table_stride + at // BLOCK, mask=seen, other=0)
        where = block.to(tl.int64) * block_stride + kv_head * head_stride + (at % BLOCK) * DIM
        inside = seen[:, None] & (dims < DIM)[None, :]
        k = tl.load(k_cache + where[:, None] + dims[None, :], mask=inside, other=0.0)
        v = tl.load(v_cache + where[:, None] + dims[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(most - higher)
        shares = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(shares, 1)
        output = output * shrink[:, None]
        output += tl.dot(shares.to(v.dtype), v, input_precision=precision)
        most = higher
    filled = begin < end
    divisor = tl.where(total > 0, total, 1.0)
    to = (token * tl.num_programs(1) * GROUP + heads) * PARTS + part
    tl.store(partial + to[:, None] * DIM + dims[None, :], output / divisor[:, None], mask=wanted)
    weight = tl.where(filled, most + tl.log(divisor), -float("inf"))
    tl.store(sums + to, weight, mask=rows < GROUP)


@triton.jit
def _join(
    partial, sums, out,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The parts' outputs, each weighted by its share of the whole softmax."""
    head = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    parts, dims = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    logs = tl.load(sums + head * PARTS + parts, mask=parts < PARTS, other=-float("inf"))
    shares = tl.exp(logs - tl.max(logs, 0))
    inside = (parts < PARTS)[:, None] & (dims < DIM)[None, :]
    outputs = tl.load(
        partial + (head * PARTS + parts)[:, None] * DIM + dims[None, :], mask=inside, other=0.0
    )
    joined = tl.sum(outputs * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(out + head * DIM + dims, joined.to(out.dtype.element_ty), mask=dims < DIM)
