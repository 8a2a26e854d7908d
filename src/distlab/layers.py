"""The parts of a Llama layer: attention with its cache and rotary embeddings, SwiGLU, RMSNorm.

Sources: grouped-query attention (Ainslie et al. 2023), rotary embeddings (Su et al. 2021), SwiGLU
(Shazeer 2020), RMSNorm (Zhang and Sennrich 2019).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlab.model_config import Llama3Rope, ModelConfig


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key-value head."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.dim_per_head
        hidden = config.hidden_size
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: "KVCache | None" = None
    ) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [batch, heads, seq, head_dim]
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        if self.groups > 1 and q.is_cuda and q.dtype == torch.float32:
            # CUDA's fused float32 kernel knows no groups, and the unfused one stores all scores
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, **causal(q, k), enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def causal(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The attention call's arguments that let each of the newest tokens see those up to itself."""
    new, total = q.shape[2], k.shape[2]
    if new == total:
        return {"is_causal": new > 1}
    if new == 1:
        return {}
    seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return {"attn_mask": seen}


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, in float32, times a weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * (wide * scale).to(x.dtype)


def rope_tables(
    config: ModelConfig, start: int, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, head_dim] for positions `start` and on, computed in float32."""
    dims = torch.arange(0, config.dim_per_head, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (dims / config.dim_per_head)
    if config.rope_scaling is not None:
        frequencies = stretch(frequencies, config.rope_scaling)
    positions = torch.arange(start, start + count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def stretch(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Llama 3.1's long-context frequencies: low ones divided, high ones kept, blended between."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of `x` [batch, heads, seq, head_dim] by its angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of past tokens, contiguous and allocated once for `max_len` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch, heads, max_len, config.dim_per_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new [batch, heads, seq, head_dim]; returns all stored so far.

        `length` grows only when the last layer is through. Raises ValueError when full.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, not {end}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
