"""A pipeline stage: its layers, whether the flags let it exist, and the slots of its time."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlab import predict
from distlab.errors import UsageError
from distlab.layers import rope_tables
from distlab.model import Llama
from distlab.predict.plan import divisors
from distlab.runtime import Runtime

FORWARD, BACKWARD = "forward", "backward"
Action = tuple[str, int]  # forward or backward, and the micro-batch


def check_cuts(args: Namespace, stages: int, layers: int) -> None:
    """Raise `UsageError` where the layers or the batch cannot be cut as the flags ask."""
    micro_batches, batch = args.micro_batches, args.batch_size
    if stages < 2:
        raise UsageError("a pipeline has 2 stages or more; use torchrun --nproc_per_node=2")
    if stages > layers:
        raise UsageError(
            f"--layers {layers} is too few for {stages} stages; use --layers {stages} or "
            "more, or fewer ranks"
        )
    if micro_batches < 1:
        raise UsageError(f"--micro-batches {micro_batches} is too few; use 1 or more")
    if batch % micro_batches:
        raise UsageError(
            f"--micro-batches {micro_batches} does not divide --batch-size {batch}; "
            f"use {divisors(batch)}"
        )


class Stage(nn.Module):
    """Consecutive layers of `whole`, on the first stage its embedding, on the last its output.

    The weights are copies, under the names that they have in the whole model. A tied embedding is
    on both ends. Where the stages do not divide the layers, the first ones take one more: the last
    has the output matrix to multiply with.
    """

    def __init__(self, whole: Llama, rank: int, stages: int) -> None:
        super().__init__()
        self.config = whole.config
        self.hidden_size = whole.config.hidden_size
        self.is_first, self.is_last = rank == 0, rank == stages - 1
        self.own_layers = predict.stage_layers(whole.config.num_hidden_layers, stages, rank)
        tied = whole.config.tie_word_embeddings
        self.holds_tied_embedding = tied and stages > 1 and (self.is_first or self.is_last)
        self.model = nn.Module()
        if self.is_first or self.holds_tied_embedding:
            self.model.embed_tokens = deepcopy(whole.model.embed_tokens)
        layers = {str(i): deepcopy(whole.model.layers[i]) for i in self.own_layers}
        self.model.layers = nn.ModuleDict(layers)
        if self.is_last:
            self.model.norm = deepcopy(whole.model.norm)
            self.lm_head = deepcopy(whole.lm_head)
            if tied:
                self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[batch, seq] tokens or [batch, seq, hidden] to the next stage's input.

        On the last stage to logits [batch, seq, vocab], or with `targets` to their mean loss.
        """
        if self.is_first:
            x = self.model.embed_tokens(x)
        rope = rope_tables(self.config, 0, x.shape[1], x.device, x.dtype)
        for layer in self.model.layers.values():
            x = layer(x, rope)
        if not self.is_last:
            return x
        logits = self.lm_head(self.model.norm(x))
        return logits if targets is None else mean_loss(logits, targets)


class Slots:
    """Gives each forward `forward_s` seconds of this stage's time, each backward twice as many.

    Work that is done sooner sleeps until its slot ends; work that takes longer is counted.
    """

    def __init__(self, job: Runtime, forward_s: float) -> None:
        self.device = job.device
        self.seconds = {FORWARD: forward_s, BACKWARD: 2 * forward_s}
        self.used: list[tuple[float, float]] = []
        self.overruns = 0

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":  # not the whole device: a message may wait for its receiver
            torch.cuda.current_stream(self.device).synchronize()
        remaining = started + self.seconds[kind] - time.perf_counter()
        self.overruns += remaining < 0
        time.sleep(max(0.0, remaining))
        self.used.append((started, time.perf_counter()))

    @property
    def busy(self) -> float:
        return sum(end - start for start, end in self.used)

    @property
    def window(self) -> float:
        """From the first start to the last end, in seconds."""
        return self.used[-1][1] - self.used[0][0]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
