"""What a training step, a prefill and a decode step cost, and each as something to run and time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distlab import predict
from distlab.measure import tensor_bytes
from distlab.model import KVCache, Llama
from distlab.script import Run


@dataclass(frozen=True)
class Workload:
    """What one run of a workload costs: its tokens, its FLOPs, the bytes it cannot avoid moving."""

    name: str
    batch: int
    tokens: int
    flops: float
    bytes_moved: float
    run: Callable[[], object]

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_moved


def training_step(model: Llama, batch: int, context: int) -> Workload:
    """Forward, backward and AdamW.

    It moves the weights twice, the gradients once, and in AdamW reads weights, gradients and two
    moments and writes all but the gradients: 10 elements a parameter. Activations are written in
    the forward pass and read in the backward pass.
    """
    a, size = model.config.architecture, model.lm_head.weight.element_size()
    tokens = random_tokens(model, batch, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.loss(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    moved = 10 * size * predict.total_parameters(a)
    flops = tokens.numel() * predict.training_flops_per_token(a, context)
    return Workload("training step", batch, tokens.numel(), flops, moved, step)


def prefill(model: Llama, batch: int, context: int) -> Workload:
    """Read a prompt into the cache; only its last token's logits are needed.

    It moves the weights and the cache that it writes. A token sees half the prompt on average.
    """
    a, size = model.config.architecture, model.lm_head.weight.element_size()
    tokens = random_tokens(model, batch, context)
    cache = new_cache(model, batch, context)

    @torch.inference_mode()
    def step() -> None:
        cache.length = 0
        model.next_logits(tokens, cache)

    unneeded = 2 * a.vocab_size * a.hidden_size * batch * (context - 1)
    flops = tokens.numel() * predict.forward_flops_per_token(a, context / 2) - unneeded
    moved = size * predict.total_parameters(a) + cache_bytes(cache)
    return Workload("prefill", batch, tokens.numel(), flops, moved, step)


def decode(model: Llama, batch: int, context: int) -> Workload:
    """Write one more token for each sequence: reads all weights and the whole cache."""
    a, size = model.config.architecture, model.lm_head.weight.element_size()
    tokens = random_tokens(model, batch, 1)
    cache = new_cache(model, batch, context)

    @torch.inference_mode()
    def step() -> None:
        cache.length = context - 1
        model.next_logits(tokens, cache)

    flops = batch * predict.forward_flops_per_token(a, context)
    moved = size * predict.total_parameters(a) + cache_bytes(cache)
    return Workload("decode", batch, batch, flops, moved, step)


def draw_roofline(
    run: Run, workloads: list[Workload], seconds: list[float], peak: float, bandwidth: float
) -> None:
    intensities = [work.intensity for work in workloads]
    ends = np.log2([min(intensities) / 2, 2 * max(*intensities, peak / bandwidth)])
    x = np.logspace(*ends, 64, base=2)
    series = [{"label": "roofline", "x": x.tolist(), "y": np.minimum(peak, x * bandwidth).tolist()}]
    for name in dict.fromkeys(work.name for work in workloads):
        points = [(w.intensity, w.flops / t) for w, t in zip(workloads, seconds, strict=True)
                  if w.name == name]  # fmt: skip
        series.append({"label": name, "x": [p[0] for p in points], "y": [p[1] for p in points]})
    run.figure(
        "workloads_roofline", kind="line", log_x=True, log_y=True, series=series,
        title="Decode is far below what the machine can compute",
        x_label="arithmetic intensity (FLOPs per byte)", y_label="FLOP/s",
    )  # fmt: skip


def random_tokens(model: Llama, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length]: what they say does not change what they cost."""
    device = model.lm_head.weight.device
    return torch.randint(model.config.vocab_size, (batch, length), device=device)


def new_cache(model: Llama, batch: int, length: int) -> KVCache:
    weight = model.lm_head.weight
    return KVCache(model.config, batch, length, weight.device, weight.dtype)


def cache_bytes(cache: KVCache) -> int:
    return tensor_bytes([cache.keys, cache.values])
