"""The proof of a sharded wrapper: it trains as torch's `fully_shard` does, and as one process."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distlab.model import Llama, config_from_args
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp.sharded import FullySharded

TOLERANCE = 1e-5  # float32: the sums over the batch are the same, their order is not
NARROW = 1e-3  # bfloat16: a weight on the border between two roundings falls to either side
LEARNING_RATE, MOMENTUM = 0.03, 0.9
LARGEST_NORM = 0.5  # of a gradient: small enough that the first steps are clipped
FEW = 16  # tokens of a sequence of the proof
MICRO_BATCHES = 2
BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Case:
    """A model, how it is sharded, and steps of one global batch each, to be shared out.

    `micro_batches` 2 accumulates; with `reduce_each` every micro-batch is reduced, else the last.
    """

    name: str
    new_model: Callable[[], nn.Module]
    batches: list[tuple[Tensor, Tensor]]
    reshard: bool | int = True
    hybrid: bool = False
    dtype: torch.dtype | None = None
    micro_batches: int = 1
    reduce_each: bool = True


@dataclass
class Trained:
    """What came of the steps; of gradients, those of the first step, before they were clipped."""

    losses: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


def cases(args: Namespace, job: Runtime) -> list[Case]:
    """Those that this number of ranks can be arranged for."""
    random = torch.Generator().manual_seed(args.seed)
    config = config_from_args(args)
    tied = replace(config, tie_word_embeddings=True)
    untied = replace(config, tie_word_embeddings=False)
    text = [text_batch(args, random, job.device) for _ in range(args.steps)]
    odd = [odd_batch(args.batch_size, random, job.device) for _ in range(args.steps)]

    def recomputing() -> Llama:
        model = Llama(tied)
        model.gradient_checkpointing = True
        return model

    several: dict[str, Any] = {"micro_batches": MICRO_BATCHES}
    found = [
        Case("tied weights", lambda: Llama(tied), text),
        Case("kept after forward", lambda: Llama(untied), text, reshard=False),
        Case("reduced once in 2", lambda: Llama(tied), text, **several, reduce_each=False),
        Case("reduced twice in 2", lambda: Llama(tied), text, **several),
        Case("activations recomputed", recomputing, text),
        Case("odd module", OddModule, odd),
        Case(BFLOAT16, lambda: Llama(tied), text, dtype=torch.bfloat16),
    ]
    if job.world_size % 2 == 0 and job.world_size > 2:
        found += [
            Case("kept by pairs", lambda: Llama(untied), text, reshard=2),
            Case("2 replicas", lambda: Llama(tied), text, hybrid=True),
        ]
    return found


def prove_equal(run: Run, args: Namespace, job: Runtime) -> None:
    """Train every case three times; table the differences, and check the largest.

    With the smallest model, unless flags shape it: what is proved does not depend on the size.
    """
    args = Namespace(**{**vars(args), "model": "smoke"})
    rows: list[list[Any]] = []
    for case in run.progress(cases(args, job), "proofs"):
        ours = train(case, args, job, Ours)
        theirs = train(case, args, job, Torchs)
        to_torch = largest_difference(ours, theirs)
        to_one = None
        if case.dtype is None:  # in bfloat16 one process rounds other partial sums
            to_one = largest_difference(ours, train(case, args, job, Alone))
        rows.append([case.name, *to_torch, max(to_one) if to_one else None])
    run.table(
        "parity",
        ["case", "losses", "first gradients", "weights", "all, to one process"], rows,
        caption=f"largest difference to fully_shard in {args.steps} steps, and to one process",
    )  # fmt: skip
    wide = [value for row in rows for value in row[1:] if value and row[0] != BFLOAT16]
    narrow = max(value for row in rows for value in row[1:] if value and row[0] == BFLOAT16)
    run.check_below("the largest of these differences, in float32", max(wide), TOLERANCE)
    run.check_below("in bfloat16, to fully_shard", narrow, NARROW)


def largest_difference(one: Trained, other: Trained) -> tuple[float, float, float]:
    """Of the losses, the first gradients and the last weights, over all ranks."""
    own = (
        (one.losses - other.losses).abs().max().item(),
        _largest(one.gradients, other.gradients),
        _largest(one.weights, other.weights),
    )
    losses, gradients, weights = zip(*gathered(own), strict=True)
    return max(losses), max(gradients), max(weights)


def _largest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Names on one side only are differences too: a parameter that is missing is not equal."""
    if some.keys() != others.keys():
        return float("inf")
    return max((some[name] - others[name]).abs().max().item() for name in some)


class Ours:
    """A case's model, sharded from scratch."""

    def __init__(self, case: Case, job: Runtime) -> None:
        self.case, self.job = case, job
        model = begin(case, job, job.rank)  # differently on every rank: rank 0's weights count
        mesh = mesh_of(case, job)
        groups: dict[str, Any] = {}
        if mesh is not None:
            groups = {"replica_group": mesh.get_group(0), "shard_group": mesh.get_group(1)}
        self.model: Any = FullySharded(
            model, units_of(model), **groups, reshard_after_forward=case.reshard, dtype=case.dtype
        )

    def share(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.job.world_size)[self.job.rank]

    @contextmanager
    def synchronizing(self, really: bool) -> Iterator[None]:
        if really:
            yield
        else:
            with self.model.no_sync():
                yield

    def clip(self) -> None:
        self.model.clip_grad_norm_(LARGEST_NORM)

    def gradients(self) -> dict[str, Tensor]:
        return self.model.whole(lambda shard: shard.grad)

    def weights(self) -> dict[str, Tensor]:
        return self.model.whole(lambda shard: shard)


class Torchs(Ours):
    """The same, by torch's own."""

    def __init__(self, case: Case, job: Runtime) -> None:
        self.case, self.job = case, job
        self.model = begin(case, job)
        precision = MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=torch.float32)
        settings: dict[str, Any] = {"mesh": mesh_of(case, job)}
        if case.dtype is not None:
            settings["mp_policy"] = precision
        for unit in units_of(self.model):
            fully_shard(unit, reshard_after_forward=case.reshard, **settings)
        fully_shard(self.model, **settings)

    @contextmanager
    def synchronizing(self, really: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(really)
        yield

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)

    def gradients(self) -> dict[str, Tensor]:
        return whole_of({n: p.grad for n, p in self.model.named_parameters()})

    def weights(self) -> dict[str, Tensor]:
        return whole_of(dict(self.model.named_parameters()))


class Alone(Torchs):
    """One process that computes the whole batch; every rank is one."""

    def __init__(self, case: Case, job: Runtime) -> None:
        self.case, self.job = case, job
        self.model = begin(case, job)

    def share(self, batch: Tensor) -> Tensor:
        return batch

    @contextmanager
    def synchronizing(self, really: bool) -> Iterator[None]:
        yield


def whole_of(named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Copies of sharded tensors, put together; those that are None are left out."""
    there = {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in there.items()}
    return {name: tensor.clone() for name, tensor in whole.items()}  # one rank's is no copy yet


def train(case: Case, args: Namespace, job: Runtime, kind: type[Ours]) -> Trained:
    """Train a case's model as `kind` does; the losses are means over the global batch."""
    trainee = kind(case, job)
    optimizer = torch.optim.SGD(trainee.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    losses = torch.zeros(len(case.batches), device=job.device)
    trained = Trained(losses, {})
    for step, batch in enumerate(case.batches):
        losses[step] = accumulate(trainee, *map(trainee.share, batch))
        if step == 0:
            trained.gradients = trainee.gradients()
        trainee.clip()
        optimizer.step()
        optimizer.zero_grad()
    if kind is not Alone:
        dist.all_reduce(losses)
        losses /= job.world_size
    trained.weights = trainee.weights()
    return trained


def accumulate(trainee: Ours, inputs: Tensor, targets: Tensor) -> Tensor:
    """Backward of the mean loss over the micro-batches, which is returned."""
    parts = trainee.case.micro_batches
    losses = []
    pieces = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
    for number, (some, theirs) in enumerate(pieces, start=1):
        with trainee.synchronizing(trainee.case.reduce_each or number == parts):
            loss = trainee.model(some, targets=theirs)
            (loss / parts).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def begin(case: Case, job: Runtime, rank: int = 0) -> nn.Module:
    torch.manual_seed(rank)
    return case.new_model().to(job.device)


def units_of(model: nn.Module) -> list[nn.Module]:
    """A model's layers."""
    inner: Any = model if isinstance(model, OddModule) else model.model
    return list(inner.layers)


def mesh_of(case: Case, job: Runtime) -> DeviceMesh | None:
    if not case.hybrid:
        return None
    return init_device_mesh(
        job.device.type, (2, job.world_size // 2), mesh_dim_names=("replicate", "shard")
    )


def text_batch(
    args: Namespace, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Any tokens will do, and few of them."""
    shape = (args.batch_size, min(args.seq_len, FEW) + 1)
    tokens = torch.randint(config_from_args(args).vocab_size, shape, generator=random).to(device)
    return tokens[:, :-1], tokens[:, 1:]


class OddModule(nn.Module):
    """Sizes that nothing divides, a tied and a frozen weight, units used twice and never."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 13)
        pair = nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 13, bias=False))
        pair[2].weight = pair[0].weight
        partly = nn.Sequential(
            nn.Linear(13, 13).requires_grad_(False), nn.Tanh(), nn.Linear(13, 13)
        )
        self.layers = nn.ModuleList([pair, nn.Linear(13, 13), partly, nn.Linear(5, 1)])
        self.scale = nn.Parameter(torch.rand(1))  # fully_shard refuses scalars
        self.leave = nn.Linear(13, 3)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of [batch, 7] inputs."""
        pair, twice, partly, _ = self.layers
        x = torch.tanh(self.enter(inputs))
        x = twice(torch.tanh(twice(pair(x)))) + partly(x)
        return F.cross_entropy(self.leave(self.scale * x), targets)


def odd_batch(size: int, random: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, 7, generator=random)
    return inputs.to(device), torch.randint(3, (size,), generator=random).to(device)
