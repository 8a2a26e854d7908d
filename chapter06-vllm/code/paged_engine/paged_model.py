"""The forward pass over a flat batch: the new tokens of all sequences, one after the other.

No sequence is padded: everything but attention treats each token alone, and attention gets the
block tables (`PagedCache`). Logits are computed for the wanted rows only: a prompt of 1,000 tokens
needs one row of the vocabulary's product, not 1,000.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distlab.layers import rope_tables
from paged_engine import kernels
from paged_engine.attention import PagedCache, Plan
from paged_engine.loading import LayerWeights, Shape, Weights


@dataclass
class StepInputs:
    """One step's tokens, on the device; `plan` says where each finds its past."""

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    wanted: Tensor  # [rows]: the tokens whose logits are asked for
    plan: Plan


@dataclass(frozen=True)
class Sharing:
    """How several processes join what each of them computes; alone there is nothing to join."""

    reduce: Callable[[Tensor], Tensor] = lambda partial: partial  # sums outputs, in place
    gather: Callable[[Tensor], Tensor] = lambda part: part  # joins parts of the vocabulary
    is_shared: bool = False  # with other processes


class Stack(Protocol):
    """All layers of a step as one call, where `takes` says so."""

    def takes(self, plan: Plan) -> bool: ...

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: Plan) -> Tensor: ...


class PagedModel:
    """A Llama-architecture decoder that keeps its past in a `PagedCache`.

    `dtype` is that of the activations; `max_length` the number of positions; `compile`: whether
    CUDA's small operators are compiled.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        cache: PagedCache,
        dtype: torch.dtype,
        max_length: int,
        sharing: Sharing,
        compile: bool = True,
    ) -> None:
        config, device = shape.config, cache.device
        self.cache, self.dtype, self.sharing = cache, dtype, sharing
        self.vocab_size, self.head_dim = config.vocab_size, config.dim_per_head
        self.eps = config.rms_norm_eps
        self.operators = kernels.operators(device, compile)
        self.embedding, self.norm = weights.embedding, weights.norm.to(dtype)
        tables = rope_tables(config, 0, max_length, device, dtype)
        # Both halves of a head turn by the same angles.
        self.cos, self.sin = (table[:, : self.head_dim // 2].contiguous() for table in tables)
        self.head = kernels.pack(weights.head)
        # Packing copies: letting go of each layer's own weights keeps the peak at one copy.
        taken = (weights.layers.pop(0) for _ in range(config.num_hidden_layers))
        self.layers = [Layer(self, index, layer) for index, layer in enumerate(taken)]
        self.stack: Stack | None = None  # made of the layers, by whoever knows how

    @torch.inference_mode()
    def __call__(self, inputs: StepInputs) -> Tensor:
        """Logits [rows, vocab] float32 of the wanted tokens; new keys and values are stored."""
        x = F.embedding(inputs.tokens, self.embedding).to(self.dtype)
        rope = self.cos[inputs.positions], self.sin[inputs.positions]
        if self.stack is not None and self.stack.takes(inputs.plan):
            last = self.stack(x, rope, inputs.plan)
            return self._logits(x[inputs.wanted], last[inputs.wanted])
        added: Tensor | None = None  # the layer before's, which joins x in the next normalisation
        for layer in self.layers[:-1]:
            added = layer(x, added, rope, inputs.plan)
        attended = self.layers[-1].attend(x, added, rope, inputs.plan)
        if inputs.wanted.shape[0] == 0:  # only the middle of long prompts: nothing is asked for
            return x.new_empty(0, self.vocab_size, dtype=torch.float32)
        x, attended = x[inputs.wanted], attended[inputs.wanted]
        return self._logits(x, self.layers[-1].feed(x, attended))

    def _logits(self, x: Tensor, added: Tensor) -> Tensor:
        """Logits [rows, vocab] of the residual stream `x` [rows, hidden] and what joins it."""
        logits = self.head(self.operators.rms_norm(x, self.norm, self.eps, added))
        return self.sharing.gather(logits)[:, : self.vocab_size].float()


class Layer:
    """Attention and SwiGLU, each normalised before and added to the residual stream."""

    def __init__(self, model: PagedModel, index: int, weights: LayerWeights) -> None:
        self.index, self.cache, self.reduce = index, model.cache, model.sharing.reduce
        self.eps, self.head_dim, self.operators = model.eps, model.head_dim, model.operators
        dtype = model.dtype
        self.input_norm, self.mlp_norm = weights.input_norm.to(dtype), weights.mlp_norm.to(dtype)
        self.head_norms = (weights.query_norm, weights.key_norm)
        self.qkv = kernels.pack(weights.qkv, weights.qkv_bias)
        self.output = kernels.pack(weights.output, weights.output_bias)
        self.gate_up = kernels.pack(weights.gate_up, weights.gate_up_bias)
        self.down = kernels.pack(weights.down, weights.down_bias)

    def __call__(
        self, x: Tensor, added: Tensor | None, rope: tuple[Tensor, Tensor], plan: Plan
    ) -> Tensor:
        """What the layer after adds to the residual stream `x` [tokens, hidden] before it starts.

        `added` is what this one adds to it, in place.
        """
        return self.feed(x, self.attend(x, added, rope, plan))

    def attend(
        self, x: Tensor, added: Tensor | None, rope: tuple[Tensor, Tensor], plan: Plan
    ) -> Tensor:
        """The heads' outputs [tokens, heads * head_dim]; keys and values are stored."""
        normed = self.operators.rms_norm(x, self.input_norm, self.eps, added)
        qkv = self.qkv(normed).unflatten(-1, (-1, self.head_dim))  # [tokens, heads + 2 kv, dim]
        self._normalise_heads(qkv)
        keys, values = self.cache.keys[self.index], self.cache.values[self.index]
        self.operators.rotate_and_store(qkv, *rope, plan.slots, keys, values)
        return self.cache.attend(self.index, qkv, plan)

    def feed(self, x: Tensor, attended: Tensor) -> Tensor:
        """Attention's output joins `x`, in place; returns what SwiGLU makes of it."""
        added = self.reduce(self.output(attended))
        normed = self.operators.rms_norm(x, self.mlp_norm, self.eps, added)
        return self.reduce(self.down(self.operators.silu_mul(self.gate_up(normed))))

    def _normalise_heads(self, qkv: Tensor) -> None:
        query_norm, key_norm = self.head_norms
        if query_norm is None or key_norm is None:
            return
        kv_heads = self.cache.shape.kv_heads
        queries, keys, _ = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        for heads, norm in ((queries, query_norm), (keys, key_norm)):
            heads.copy_(F.rms_norm(heads, norm.shape, norm.to(heads.dtype), self.eps))
