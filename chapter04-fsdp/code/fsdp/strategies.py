"""Ways to divide one training over ranks: what each keeps and sends, and how it is built.

A table, so that a further way, such as DeepSpeed's stages, is a further row: a `Training` of its
own where a step is not made of backward and the optimizer's step, and two formulas.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab.model import Llama, config_from_args, num_parameters
from distlab.runtime import Runtime

FLOAT = 4  # bytes
ONE_BUCKET = 2**20  # MiB, more than any model here has: nothing is sent before backward's end
LEARNING_RATE = 1e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What the formulas need: bytes of all parameters, and of the root, which is in no layer.

    `reduction` is how much more a reduce-scatter sends than it must (`distlab.traffic`).
    """

    whole: float
    root: float
    ranks: int
    replicas: int
    reduction: int

    @staticmethod
    def of(model: Llama, ranks: int, replicas: int, reduction: int) -> "Sizes":
        whole = FLOAT * num_parameters(model)
        layers = FLOAT * sum(map(num_parameters, model.model.layers))
        return Sizes(whole, whole - layers, ranks, replicas, reduction)

    def all_reduced(self, size: float, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * size

    def sharded(self, ranks: int, kept: bool = False) -> float:
        """Units gathered twice, the root and what is `kept` since forward once; all reduced."""
        gathered = self.whole if kept else 2 * self.whole - self.root
        return (ranks - 1) / ranks * (gathered + self.reduction * self.whole)


class Training:
    """A model as one strategy has it, its optimizer, and what is a step of both."""

    def __init__(self, model: Llama, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.wrapped, self.optimizer = model, wrapped, optimizer

    @property
    def own_optimizer(self) -> torch.optim.Optimizer:
        """The one that has this rank's part of the state."""
        return getattr(self.optimizer, "optim", self.optimizer)

    def step(self, batch: Batch) -> Tensor:
        """The loss of a step on [sequences, tokens] inputs and targets; its gradients stay."""
        self.optimizer.zero_grad()
        loss: Tensor = self.wrapped(batch[0], targets=batch[1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class Strategy:
    """`stage` of ZeRO tells what is divided: 0 nothing, 1 optimizer state, 3 weights as well.

    With `by_replica` it is divided among the ranks of a replica, else among all. `sent` are the
    bytes that a rank sends in a step, in the mean; `begin` gets the whole model.
    """

    stage: int
    sent: Callable[[Sizes], float]
    begin: Callable[[Llama, DeviceMesh], Training]
    by_replica: bool = False

    def shards(self, sizes: Sizes) -> int:
        return sizes.ranks // sizes.replicas if self.by_replica else sizes.ranks


def replicate(model: Llama) -> DDP:
    return DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=ONE_BUCKET)


def shard(model: Llama, mesh: DeviceMesh | None, reshard: bool = True) -> Llama:
    """By layers, over all ranks, or those of a mesh [ranks] or [replicas, ranks of each]."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def _replicated(model: Llama, mesh: DeviceMesh) -> Training:
    return Training(model, replicate(model), adamw(model.parameters()))


def _zero_1(model: Llama, mesh: DeviceMesh) -> Training:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles much as it is imported

    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=LEARNING_RATE, fused=True
    )
    return Training(model, replicate(model), optimizer)


def _sharded(reshard: bool, hybrid: bool, model: Llama, mesh: DeviceMesh) -> Training:
    shard(model, mesh if hybrid else None, reshard)
    return Training(model, model, adamw(model.parameters()))


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _hybrid_sent(sizes: Sizes) -> float:
    within = sizes.ranks // sizes.replicas
    return sizes.sharded(within) + sizes.all_reduced(sizes.whole / within, sizes.replicas)


STRATEGIES: Mapping[str, Strategy] = {
    "ddp": Strategy(0, lambda s: s.all_reduced(s.whole, s.ranks), _replicated),
    "zero-1": Strategy(  # and every rank sends the weights that it has updated to all others
        1, lambda s: 1.5 * s.all_reduced(s.whole, s.ranks), _zero_1
    ),
    "full": Strategy(3, lambda s: s.sharded(s.ranks), partial(_sharded, True, False)),
    "grad": Strategy(3, lambda s: s.sharded(s.ranks, kept=True), partial(_sharded, False, False)),
    "hybrid": Strategy(3, _hybrid_sent, partial(_sharded, True, True), by_replica=True),
}


def own_batch(args: Namespace, job: Runtime, sequences: int) -> Batch:
    """This rank's, always the same: inputs and targets [sequences, tokens]."""
    generator = torch.Generator().manual_seed(args.seed + job.rank)
    shape = (sequences, args.seq_len + 1)
    tokens = torch.randint(config_from_args(args).vocab_size, shape, generator=generator)
    tokens = tokens.to(job.device)
    return tokens[:, :-1], tokens[:, 1:]
