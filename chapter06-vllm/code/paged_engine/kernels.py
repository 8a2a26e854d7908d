"""The engine's operators on a CPU: matrix products, attention over the paged cache, small ones.

Decoding reads every weight for each step, so at one request the memory's bandwidth is the limit,
and at 64 the arithmetic is. torch reaches neither: its product of one row with a float32 weight
stays below the bandwidth, and on a processor without instructions for bfloat16 it multiplies
bfloat16 at a fraction of the speed of float32, which is where vLLM loses most on such a machine.
Three things help:

- A weight is packed once, in the order in which the product reads it and in large pages (`pack`),
  and the product is compiled for this machine's instructions (`cpp/linear.cpp`).
- Weights of bfloat16 stay so in memory, half the bytes, and become float32 on their way to the
  registers: every product is as fast as in float32, or faster, and its sums are exact to float32.
- A float32 weight whose lower halves are all zero was bfloat16 once. It is kept as such, which
  loses nothing. Many published float32 models are of this kind.

A token's result is bit for bit the same whatever else is in the batch, so that batching cannot
change a greedy output; only prompts of more than 64 new tokens go through torch's attention, whose
sums are in another order.

Both promises hold on every processor, so AVX-512's instructions for bfloat16 stay unused: they
would round what is multiplied, and to keep float32 exact in three parts would take three of them,
each of which does the work of two. Without a C++ compiler everything goes to plain torch, exact to
float32 too, but with sums that may differ from batch to batch; so does what lies on another device.
`describe` says what is used, and the variable PAGED_ENGINE_KERNELS chooses (`native`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_engine import torch_operators
from paged_engine.native import Native, native
from paged_engine.packing import Linear, Product, by_torch

NATIVE_TYPES = (torch.float32, torch.bfloat16)


def describe() -> str:
    """What computes the operators here, and why, in a few words."""
    built, words = native()
    return f"plain torch kernels ({words})" if built is None else f"{words} kernels"


def pack(weight: Tensor, bias: Tensor | None = None) -> Product:
    """The product x Wᵀ + b with `weight` [out, in] and `bias` [out], packed for this machine.

    The product takes x [..., in] of any floating type and gives [..., out] of the same type; sums
    are float32. Keep activations in float32 even beside bfloat16 weights: it is more exact and
    saves conversions. The weight is copied, so drop the original.
    """
    if weight.dim() != 2:
        raise ValueError(f"a weight of {weight.dim()} dimensions cannot be packed; it needs 2")
    built, _ = native()
    if built is None or weight.device.type != "cpu" or weight.dtype not in NATIVE_TYPES:
        return by_torch(weight, bias)
    return Linear(weight, bias, built)


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """`x` [tokens, hidden] over its root mean square, times `weight` [hidden].

    With `added` [tokens, hidden], `x` is the residual stream: `added` is added to it first, in
    place.
    Source: Zhang and Sennrich 2019.
    """
    built = _native_for(x, weight) if added is None else _native_for(x, weight, added)
    if built is None:
        return torch_operators.rms_norm(x, weight, eps, added)
    out = torch.empty_like(x)
    built.library.rms_norm(
        x.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        eps,
        torch.get_num_threads(),
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up [tokens, width] of `gate_up` [tokens, 2 · width], the gates first."""
    built = _native_for(gate_up)
    if built is None:
        return torch_operators.silu_mul(gate_up)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    built.library.silu_mul(
        gate_up.data_ptr(), out.data_ptr(), tokens, width, torch.get_num_threads()
    )
    return out


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """Turn queries and keys by their positions, in place, and write keys and values to the cache.

    `qkv` [tokens, heads + 2 · kv_heads, head_dim]; `cos`, `sin` [tokens, head_dim / 2]; `slots`
    [tokens] int64: block · block_size + place in it, below 0 for a token that is not kept; caches
    [blocks, kv_heads, block_size, head_dim]. Source of the rotation: Su et al. 2021, in the layout
    of Llama's checkpoints.
    """
    built = _native_for(qkv, cos, sin)
    name = _for_cache("rotate_and_store", k_cache, v_cache)
    if built is None or name is None or not slots.is_contiguous():
        return torch_operators.rotate_and_store(qkv, cos, sin, slots, k_cache, v_cache)
    tokens, all_heads, head_dim = qkv.shape
    _, kv_heads, block_size, _ = k_cache.shape
    getattr(built.library, name)(
        *(t.data_ptr() for t in (qkv, cos, sin, slots.long(), k_cache, v_cache)),
        tokens,
        all_heads - 2 * kv_heads,
        kv_heads,
        head_dim,
        block_size,
        torch.get_num_threads(),
    )


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each token over the first `lengths` positions of its block table.

    `query` [tokens, heads, head_dim]; caches [blocks, kv_heads, block_size, head_dim], float32 or
    bfloat16; `block_tables` [tokens, max_blocks] int32; `lengths` [tokens] int32, the token itself
    counted; gives [tokens, heads, head_dim]. The tokens of a prefill chunk are as good as those of
    a decode: same table, lengths that grow by one. A token of length 0 gets zeros.
    """
    name = _for_cache("attention", k_cache, v_cache)
    built, _ = native()
    tokens, heads, head_dim = query.shape
    _, kv_heads, block_size, _ = k_cache.shape
    rows_whole = query.dtype == torch.float32 and query.stride()[1:] == (head_dim, 1)
    whole = block_tables.stride(1) == 1 and lengths.is_contiguous()
    if (
        built is None
        or name is None
        or not (whole and rows_whole)
        or not built.library.attention_takes(head_dim)
    ):
        return torch_operators.paged_decode_attention(
            query, k_cache, v_cache, block_tables, lengths, scale
        )
    out = torch.empty(tokens, heads, head_dim)
    getattr(built.library, name)(
        *(t.data_ptr() for t in (query, k_cache, v_cache, block_tables, lengths, out)),
        tokens,
        heads,
        kv_heads,
        head_dim,
        block_size,
        query.stride(0),
        block_tables.stride(0),
        scale,
        torch.get_num_threads(),
    )
    return out


@dataclass(frozen=True)
class Operators:
    """A layer's small operators on one device; see the functions of the same names."""

    rms_norm: Callable[..., Tensor]  # (x, weight, eps, added)
    silu_mul: Callable[[Tensor], Tensor]
    rotate_and_store: Callable[..., None]  # (qkv, cos, sin, slots, k_cache, v_cache)


def operators(device: torch.device, compile: bool) -> Operators:
    """The operators for `device`; `compile`: whether torch.compile may make CUDA's.

    On CUDA each is one kernel then, so that what a layer does between its matrix products is read
    and written once. None of them waits for the device, so that a CUDA graph can hold them: tokens
    that are not kept go to the scratch block, so every slot is 0 or more.
    """
    if device.type == "cpu":
        return Operators(rms_norm, silu_mul, rotate_and_store)
    made = Operators(
        torch_operators.rms_norm, torch_operators.silu_mul, torch_operators.rotate_and_store_all
    )
    if not compile:
        return made
    return Operators(**{name: torch.compile(f, dynamic=True) for name, f in vars(made).items()})


def _native_for(*tensors: Tensor) -> Native | None:
    """The compiled operators, if all `tensors` are as these need them."""
    fit = all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
    return native()[0] if fit else None


def _for_cache(operator: str, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """The name of `operator` for caches of this type; None where there is none."""
    fit = all(
        t.is_cpu and t.is_contiguous() and t.dtype in NATIVE_TYPES for t in (k_cache, v_cache)
    )
    if not fit or k_cache.dtype != v_cache.dtype:
        return None
    return f"{operator}_{str(k_cache.dtype).removeprefix('torch.')}"
