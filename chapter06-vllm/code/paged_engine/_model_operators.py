"""A layer's small operators on the device at hand, with the signatures of `kernels`.

On a CPU they are `kernels` own. On CUDA each is one kernel that torch.compile makes, so that what a
layer does between its matrix products is read and written once; and none of them waits for the
device, so that a CUDA graph can hold them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_engine import _kernels_torch, kernels


@dataclass(frozen=True)
class Operators:
    """See the functions of the same names in `kernels`."""

    rms_norm: Callable[..., Tensor]  # (x, weight, eps, added)
    silu_mul: Callable[[Tensor], Tensor]
    rotate_and_store: Callable[..., None]  # (qkv, cos, sin, slots, k_cache, v_cache)


def operators(device: torch.device, compile: bool) -> Operators:
    """The operators for `device`; `compile`: whether torch.compile may make CUDA's."""
    if device.type == "cpu":
        return Operators(kernels.rms_norm, kernels.silu_mul, kernels.rotate_and_store)
    made = Operators(_kernels_torch.rms_norm, _kernels_torch.silu_mul, _rotate_and_store)
    if not compile:
        return made
    fused = {name: torch.compile(f, dynamic=True) for name, f in vars(made).items()}
    return Operators(**fused)


def _rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """Tokens that are not kept go to the scratch block, so every slot is 0 or more."""
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    turned = qkv[:, :-kv_heads]
    a, b = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    block, place = slots // block_size, slots % block_size
    k_cache[block, :, place] = qkv[:, -2 * kv_heads : -kv_heads].to(k_cache.dtype)
    v_cache[block, :, place] = qkv[:, -kv_heads:].to(v_cache.dtype)
