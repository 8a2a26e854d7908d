"""Work to be timed: a training step, a prefill, a decode step, and a server that has a queue."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distlab import predict
from distlab.measure import tensor_bytes
from distlab.model import KVCache, Llama
from distlab.queueing import mean_wait


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


def random_tokens(model: Llama, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length]: what they say does not change what they cost."""
    device = model.lm_head.weight.device
    return torch.randint(model.config.vocab_size, (batch, length), device=device)


def new_cache(model: Llama, batch: int, length: int) -> KVCache:
    weight = model.lm_head.weight
    return KVCache(model.config, batch, length, weight.device, weight.dtype)


def cache_bytes(cache: KVCache) -> int:
    return tensor_bytes([cache.keys, cache.values])


class Server:
    """Answers requests in order of arrival, up to `max_batch` of those that wait together.

    Every answer is really computed and timed; only idle time is skipped rather than slept through.
    """

    def __init__(self, arrivals: np.ndarray, max_batch: int) -> None:
        self.arrivals = arrivals  # seconds, ascending
        self.max_batch = max_batch
        self.wait, self.latency = np.zeros_like(arrivals), np.zeros_like(arrivals)
        self.services: list[float] = []
        self.clock, self.served = 0.0, 0

    @property
    def done(self) -> bool:
        return self.served == len(self.arrivals)

    def serve_next(self, answer: Callable[[int], float]) -> None:
        self.clock = max(self.clock, self.arrivals[self.served])
        arrived = int(np.searchsorted(self.arrivals, self.clock, side="right"))
        batch = slice(self.served, min(arrived, self.served + self.max_batch))
        self.wait[batch] = self.clock - self.arrivals[batch]
        self.services.append(answer(batch.stop - batch.start))
        self.clock += self.services[-1]
        self.latency[batch] = self.clock - self.arrivals[batch]
        self.served = batch.stop

    @property
    def waited(self) -> float:
        """The fraction of requests that had to wait."""
        return float(np.mean(self.wait > 0))

    def summary(self, endless: float | None) -> list[float | None]:
        """Requests/s, % that waited; in ms the mean wait, that of an endless queue if it is known,
        and the median and 99th percentile of the latency."""
        p50, p99 = 1e3 * np.percentile(self.latency, [50, 99])
        rate = len(self.arrivals) / self.clock
        expected = None if endless is None else 1e3 * endless
        return [rate, 100 * self.waited, 1e3 * self.wait.mean(), expected, p50, p99]


def endless_wait(server: Server, load: float) -> float:
    services = np.array(server.services)
    return mean_wait(load / services.mean(), services)
