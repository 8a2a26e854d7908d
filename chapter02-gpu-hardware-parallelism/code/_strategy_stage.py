"""A rank's part of a Llama under a plan: its pipeline stage's layers, its tensor-parallel slices.

The device is paced: a rank really computes, then sleeps until a device of the stated FLOP/s would
be done. So four ranks can share two processors and still show what four devices would.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from _traffic import Traffic
from torch import Tensor, nn

from distlab.layers import Attention, FeedForward, RMSNorm, rope_tables
from distlab.model import Llama, ModelConfig
from distlab.predict import stage_layers

COLUMNS = ("o_proj", "down_proj")  # divided by columns; the others by rows, that is by outputs


class Pace:
    """Makes this rank as slow as a device of `flops` FLOP/s; None: as fast as it is."""

    def __init__(self, flops: float | None = None) -> None:
        self.flops = flops
        self.late = 0.0  # seconds by which real computing took longer than the device's, in all
        self._piece = 0.0
        self._since = 0.0

    @contextmanager
    def computing(self, flops: float, sends: int = 0) -> Iterator[None]:
        """Inside, `sends` times something is sent; before, between and after it is computed."""
        self._piece = 0.0 if self.flops is None else flops / self.flops / (sends + 1)
        self._since = time.perf_counter()
        yield
        self._wait()
        self._piece = 0.0

    def sent(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Send when the device would have what is to be sent.

        What the operating system slept too long is taken off the next piece: a device does not
        oversleep, and a plan that sends often must not seem slower than it is.
        """
        overslept = self._wait()
        result = function(*arguments)
        self._since = time.perf_counter() - overslept
        return result

    def _wait(self) -> float:
        """Sleep until the device would have done its piece; the seconds slept too long."""
        if not self._piece:
            return 0.0
        end = self._since + self._piece
        left = end - time.perf_counter()
        if left <= 0:
            self.late -= left
            return 0.0
        time.sleep(left)
        return min(time.perf_counter() - end, self._piece)


class Enter(torch.autograd.Function):
    """Into the tensor-parallel region: every rank has x; their gradients of it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Traffic, pace: Pace) -> Tensor:
        ctx.tp, ctx.pace = tp, pace
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pace.sent(ctx.tp.all_reduce, gradient.contiguous()), None, None


class Leave(torch.autograd.Function):
    """Out of it: the ranks' partial sums are added; the gradient is the same for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Traffic, pace: Pace) -> Tensor:
        return pace.sent(tp.all_reduce, x.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class Block(nn.Module):
    """A layer with 1/tp of the heads and of the MLP's columns (Megatron-LM, arXiv 1909.08053)."""

    def __init__(self, config: ModelConfig, index: int, tp: Traffic, pace: Pace) -> None:
        super().__init__()
        share = replace(
            config,
            head_dim=config.dim_per_head,
            num_attention_heads=config.num_attention_heads // tp.world_size,
            num_key_value_heads=config.num_key_value_heads // tp.world_size,
            intermediate_size=config.intermediate_size // tp.world_size,
        )
        self.tp, self.pace = tp, pace
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(share, index)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = FeedForward(share)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self._divided(self.input_layernorm(x), lambda y: self.self_attn(y, rope))
        return x + self._divided(self.post_attention_layernorm(x), self.mlp)

    def _divided(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.tp.world_size == 1:
            return part(x)
        return Leave.apply(part(Enter.apply(x, self.tp, self.pace)), self.tp, self.pace)


class Stage(nn.Module):
    """The layers of one pipeline stage, the embedding on the first, the output on the last."""

    def __init__(self, whole: Llama, pp: int, index: int, tp: Traffic, pace: Pace) -> None:
        super().__init__()
        config = whole.config
        self.first, self.last = index == 0, index == pp - 1
        self.layers = nn.ModuleDict(
            {
                str(n): Block(config, n, tp, pace)
                for n in stage_layers(config.num_hidden_layers, pp, index)
            }
        )
        if self.first:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if self.last:
            self.norm = RMSNorm(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.config = config
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                full = whole.get_parameter(whole_name(name))
                parameter.copy_(tp_slice(name, full, tp))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Hidden vectors for the next stage, or the mean loss; `x` are tokens on the first."""
        if self.first:
            x = self.embed_tokens(x)
        rope = rope_tables(self.config, 0, x.shape[1], x.device, x.dtype)
        for block in self.layers.values():
            x = block(x, rope)
        if not self.last:
            return x
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def whole_name(name: str) -> str:
    """The name that a stage's parameter has in the whole model."""
    return name if name.startswith("lm_head") else f"model.{name}"


def tp_slice(name: str, full: Tensor, tp: Traffic) -> Tensor:
    """This rank's part of a parameter; norms, embedding and output are whole on every rank."""
    if full.dim() == 1 or name.startswith(("lm_head", "embed")):
        return full
    columns = any(part in name for part in COLUMNS)
    return full.chunk(tp.world_size, dim=1 if columns else 0)[tp.rank]
