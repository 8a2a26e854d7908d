"""The run that `checkpoint_resume.py` resumes: it has everything that can be forgotten."""

import math
import random
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _checkpoint_encoding import encode
from _training_state import collect, restore, settle_buckets
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import data
from distlab.model import model_from_args
from distlab.runtime import Runtime, seed_everything


class Trainee:
    """A model under DDP with AdamW, a schedule, a loss scale, a loader, and random numbers.

    In float32 the loss scale, a power of two, changes no bit of a gradient. But it has a state.
    """

    def __init__(self, args: Namespace, job: Runtime, tokens: data.Tokens, seed: int) -> None:
        self.job = job
        seed_everything(seed)
        self.model = model_from_args(args, job.device)
        seed_everything(seed + 1 + job.rank)  # each rank draws its own random numbers
        self.ddp = DDP(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_after_warm_up(step, args.steps)
        )
        self.scaler = torch.amp.GradScaler(job.device.type, init_scale=1024.0, growth_interval=3)
        self.loader = data.Loader(
            tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed,
            job.device, prefetch=2,
        )  # fmt: skip
        self._parts = (self.ddp, self.optimizer, self.loader, self.scheduler, self.scaler)

    def state(self) -> dict[str, Any]:
        return collect(*self._parts, job=self.job)

    def restore(
        self, state: dict[str, Any], left_out: Sequence[str] = (), settle: bool = True
    ) -> None:
        """Take the state up, but for the parts left out, which stay as they are."""
        own = self.state()
        if settle:
            settle_buckets(self.ddp, self._loss)
        restore({**state, **{part: own[part] for part in left_out}}, *self._parts, job=self.job)

    def train(self, steps: int) -> Tensor:
        """The losses of the next steps, mean of all ranks, float32 [steps]."""
        losses = torch.stack([self._step() for _ in range(steps)])
        self.loader.close()
        return losses.cpu()

    def _step(self) -> Tensor:
        loss = self._loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(
            mean
        )  # each loss for itself: in one sum of all, bits depend on their number
        return mean / self.job.world_size

    def _loss(self) -> Tensor:
        input_ids, targets = next(self.loader)
        return self.ddp(with_mistakes(input_ids, self.model.config.vocab_size), targets=targets)


def with_mistakes(input_ids: Tensor, vocab_size: int) -> Tensor:
    """`input_ids` [batch, seq] with up to 3 in 10 replaced, by the numbers of three generators."""
    share = random.uniform(0.0, 0.3)
    places = torch.from_numpy(np.random.random(tuple(input_ids.shape)) < share)
    anything = torch.randint_like(input_ids, vocab_size)
    return torch.where(places.to(input_ids.device), anything, input_ids)


def cosine_after_warm_up(step: int, steps: int) -> float:
    """The learning rate's factor: up over a tenth of the steps, then down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def differing(one: Any, other: Any) -> tuple[list[str], int]:
    """The names of what differs in two states, bit for bit, and how much was compared."""
    (tree, tensors), (other_tree, other_tensors) = encode(one), encode(other)
    leaves, other_leaves = dict(_leaves(tree)), dict(_leaves(other_tree))
    wrong = [
        name for name in {**leaves, **other_leaves} if leaves.get(name) != other_leaves.get(name)
    ]
    wrong += [
        name
        for name in {**tensors, **other_tensors}
        if name not in tensors or name not in other_tensors
        or not same_bits(tensors[name], other_tensors[name])
    ]  # fmt: skip
    return wrong, len(leaves) + len(tensors)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value that is no list or object, by its place in the tree."""
    if isinstance(tree, dict):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return [(path, tree)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}/{key}")]


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bytes_of_both = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bytes_of_both)
