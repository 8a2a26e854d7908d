"""The operators of `kernels` in plain torch: what they mean, and what runs without a compiler."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    """See `kernels.rms_norm`."""
    if added is not None:
        x += added
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """See `kernels.rotate_and_store`."""
    kept = slots >= 0
    _rotate(qkv[:, : -k_cache.shape[1]], cos, sin)
    _store(qkv[kept], slots[kept], k_cache, v_cache)


def rotate_and_store_all(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """`rotate_and_store` of tokens that are all kept: nothing here waits for the device."""
    _rotate(qkv[:, : -k_cache.shape[1]], cos, sin)
    _store(qkv, slots, k_cache, v_cache)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Queries and keys, in place."""
    a, b = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    heads.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


def _store(qkv: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    block, place = slots // block_size, slots % block_size
    k_cache[block, :, place] = qkv[:, -2 * kv_heads : -kv_heads].to(k_cache.dtype)
    v_cache[block, :, place] = qkv[:, -kv_heads:].to(v_cache.dtype)


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """See `kernels.paged_decode_attention`: all tables padded to the longest, and masked."""
    tokens, heads, head_dim = query.shape
    if tokens == 0:
        return torch.empty_like(query)
    _, kv_heads, block_size, _ = k_cache.shape
    blocks = max(1, -(-int(lengths.max()) // block_size))
    positions = torch.arange(blocks * block_size, device=query.device)
    hidden = positions >= lengths[:, None]  # [tokens, positions]
    tables = block_tables[:, :blocks].long()
    tables = tables.masked_fill(hidden[:, ::block_size], 0)  # what lies there is never read
    keys, values = (
        cache[tables].transpose(1, 2).flatten(2, 3).to(query.dtype) for cache in (k_cache, v_cache)
    )  # [tokens, kv_heads, positions, head_dim]
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = grouped @ keys.transpose(-1, -2) * scale
    shares = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    shares = shares.masked_fill(hidden[:, None, None], 0)  # all hidden: 0, not NaN
    values = values.masked_fill(hidden[:, None, :, None], 0)
    return (shares @ values).reshape(tokens, heads, head_dim)
