"""Ulysses' attention: two all-to-all, between which each rank has all tokens of some heads."""

from functools import partial

import torch
import torch.nn.functional as F
from _traffic import Traffic
from tensor_parallel import Conjugate
from torch import Tensor


class Ulysses:
    """Attention over the ranks' tokens [batch, heads, seq/K, head_dim], which stand in order."""

    zigzag = False

    def __init__(self) -> None:
        self.traffic = Traffic()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.exchange(x, split=1, join=2) for x in (q, k, v))  # [.., heads/K, seq, ..]
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.exchange(out, split=2, join=1)

    def exchange(self, x: Tensor, split: int, join: int) -> Tensor:
        """Split dimension `split` over the ranks, and have all of `join`; backward the reverse."""
        return Conjugate.apply(x, partial(self.swap, split, join), partial(self.swap, join, split))

    def swap(self, split: int, join: int, x: Tensor) -> Tensor:
        parts = torch.stack(x.chunk(self.traffic.world_size, split))  # one for each rank
        return torch.cat(self.traffic.all_to_all(parts).unbind(), join)
