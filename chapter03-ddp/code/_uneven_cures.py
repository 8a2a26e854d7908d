"""Ways to train an epoch on ranks of which some have fewer batches, and one process to compare."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler, TensorDataset

from distlab.runtime import Runtime


class Batch(NamedTuple):
    """Examples int64 [n, seq + 1] and their weights [n]: 0 for one that shall not count."""

    examples: Tensor
    weights: Tensor


Dealt = Sequence[Sequence[Batch]]  # by rank: its batches


class Trainee:
    """A model with plain SGD: an update is the gradient itself, so nothing hides a wrong scale."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def losses(self, examples: Tensor) -> Tensor:
        """The mean loss of each example, [n]."""
        logits = self.model(examples[:, :-1]).float()
        return F.cross_entropy(logits.mT, examples[:, 1:], reduction="none").mean(dim=1)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def batched(examples: Tensor, size: int) -> list[Batch]:
    return [Batch(part, torch.ones(len(part), device=part.device)) for part in examples.split(size)]


def one_process(trainee: Trainee, dealt: Dealt) -> None:
    """Every example that counts, of all ranks' batches of a step, in one batch."""
    for step in range(max(map(len, dealt))):
        batches = [own[step] for own in dealt if step < len(own)]
        distinct = torch.cat([batch.examples[batch.weights > 0] for batch in batches])
        trainee.step(trainee.losses(distinct).mean())


def plain(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """The usual loop. Where a rank has fewer batches than another, the other one hangs."""
    trainee.model = DDP(trainee.model)
    for batch in own:
        trainee.step(trainee.losses(batch.examples).mean())


def join_divided_by_all(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    trainee.model = DDP(trainee.model)
    with trainee.model.join(divide_by_initial_world_size=True):  # torch's default
        for batch in own:
            trainee.step(trainee.losses(batch.examples).mean())


def join_divided_by_active(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    trainee.model = DDP(trainee.model)
    with trainee.model.join(divide_by_initial_world_size=False):
        for batch in own:
            trainee.step(trainee.losses(batch.examples).mean())


def weighted(trainee: Trainee, own: Sequence[Batch], job: Runtime) -> None:
    """Exact whatever the ranks have: the sum of all weights is the flag, and the divisor."""
    trainee.model = DDP(trainee.model)
    nothing = Batch(own[0].examples[:1], torch.zeros(1, device=job.device))
    for batch in chain(own, repeat(nothing)):
        total = batch.weights.sum()
        dist.all_reduce(total)
        if total == 0:
            return
        loss = (batch.weights * trainee.losses(batch.examples)).sum()
        trainee.step(loss * job.world_size / total)  # DDP will divide by the world size


Cure = Callable[[Trainee, Sequence[Batch], Runtime], None]


def dealt_by_sampler(dealt: Dealt, ranks: int) -> list[list[Batch]]:
    """All ranks' examples, dealt anew by DistributedSampler; what it repeats has weight 0."""
    examples = torch.cat([batch.examples for own in dealt for batch in own])
    size = len(dealt[0][0].examples)
    anew = []
    for rank in range(ranks):
        sampler: DistributedSampler = DistributedSampler(
            TensorDataset(examples), ranks, rank, shuffle=False
        )
        indices = torch.tensor(list(sampler), device=examples.device)
        # The rank's i-th is number i * ranks + rank of the list, which begins anew at its end.
        places = rank + ranks * torch.arange(len(indices), device=examples.device)
        weights = (places < len(examples)).float()
        parts = zip(examples[indices].split(size), weights.split(size), strict=True)
        anew.append([Batch(*part) for part in parts])
    return anew
