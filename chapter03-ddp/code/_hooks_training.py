"""Trains a replica with every hook on the same batches, side by side, and measures its steps."""

import copy
import hashlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _hooks_links import ask_for_rate
from _hooks_payload import Payload
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import data
from distlab.errors import UsageError
from distlab.model import config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime

LOSS, SECONDS, CPU, WIRE = range(4)


@dataclass(frozen=True)
class Hook:
    """A communication hook: how it is registered, and the bytes that a rank sends by it."""

    register: Callable[[DDP, Namespace], None]
    payload: Payload


@dataclass
class Measured:
    """One hook. Seconds are medians over the steps, of the slowest rank in each."""

    name: str
    payload: float  # predicted bytes of a rank and step
    losses: list[float]  # mean over the ranks, a step each
    seconds: float  # of a step, on the link as it is
    cpu_seconds: float  # of a step, of all threads of a rank, mean over the ranks
    wire: float | None  # bytes that a rank's interface has sent in a step, at most
    on_link: dict[str, float] = field(default_factory=dict)  # seconds of a step, by rate


class Trainee:
    """A replica with its hook and its optimizer: SGD, whose update is linear in the gradient.

    AdamW would hide what a hook spoils, as it divides the gradient's size out.

    All of its gradients are one bucket. gloo runs collectives on two threads, and on them torch's
    PowerSGD waits, when a bucket's first all-reduce is done, for its second and third. With more
    buckets both threads wait so, none is left to carry an all-reduce out, and the job hangs.
    """

    def __init__(self, hook: Hook, model: nn.Module, args: Namespace) -> None:
        megabytes = sum(p.nbytes for p in model.parameters()) // 2**20 + 1
        self.replica = DDP(model, bucket_cap_mb=megabytes, gradient_as_bucket_view=True)
        hook.register(self.replica, args)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)

    def step(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        loss = self.replica(input_ids, targets=targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def digest(self) -> str:
        """Of all weights, bit for bit."""
        weights = torch.cat([p.detach().flatten() for p in self.replica.parameters()])
        return hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()


def measure_hooks(
    run: Run, args: Namespace, job: Runtime, hooks: Mapping[str, Hook]
) -> list[Measured]:
    """Train with each of `args.hooks` and measure; then on each link, if this job may ask for it.

    The hooks take turns in every step, so that a change of the machine's speed meets all of them.
    """
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    batches = data.Loader(
        tokens, args.seq_len, args.batch_size, job.rank, job.world_size, args.seed, job.device
    )
    model = model_from_args(args, job.device)
    trainees = [Trainee(hooks[name], copy.deepcopy(model), args) for name in args.hooks]
    meter = Meter(job, trainees, args.interface)
    trained = meter.measure(next(batches) for _ in run.progress(range(args.steps), "training"))
    steady = trained[:, args.start_powersgd + 1 :]  # the first of a kind allocates
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    measured = [
        Measured(
            name=name,
            payload=hooks[name].payload(shapes, job.world_size),
            losses=trained[:, :, index, LOSS].mean(axis=0).tolist(),
            seconds=slowest(steady[:, :, index, SECONDS]),
            cpu_seconds=float(np.median(steady[:, :, index, CPU])),
            wire=slowest(steady[:, :, index, WIRE]) if args.interface else None,
        )
        for index, name in enumerate(args.hooks)
    ]
    for rate in args.rates if args.ask else []:
        ask_for_rate(Path(args.ask), rate, job, args.timeout)
        timed = meter.measure(next(batches) for _ in range(args.timed_steps))
        for index, one in enumerate(measured):
            one.on_link[rate] = slowest(timed[:, :, index, SECONDS])
    digests = [trainee.digest() for trainee in trainees]
    everybody: list[list[str]] = [[] for _ in range(job.world_size)]
    dist.all_gather_object(everybody, digests)
    run.check_equal(
        "with every hook all ranks end with the same weights, bit for bit",
        [len(set(one)) for one in zip(*everybody, strict=True)],
        [1] * len(trainees),
    )
    return measured


def slowest(samples: np.ndarray) -> float:
    """The median over the steps of the largest of all ranks; of [ranks, steps]."""
    return float(np.median(samples.max(axis=0)))


class Meter:
    """Steps of all trainees in turns, each with its loss, its times and its bytes."""

    def __init__(self, job: Runtime, trainees: Sequence[Trainee], interface: str | None) -> None:
        self.job, self.trainees, self.interface = job, trainees, interface
        idle = [self._around(no_step)[WIRE] for _ in range(9)]
        self.barriers = float(np.median(idle))  # bytes of those around a step

    def measure(self, batches: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Samples [ranks, steps, trainees, 4], the same on every rank."""
        steps = [
            [self._around(partial(trainee.step, *batch)) for trainee in self.trainees]
            for batch in batches
        ]
        own = torch.tensor(steps, dtype=torch.float64, device=self.job.device)
        gathered = [torch.empty_like(own) for _ in range(self.job.world_size)]
        dist.all_gather(gathered, own)
        samples = torch.stack(gathered).cpu().numpy()
        samples[..., WIRE] -= self.barriers
        return samples

    def _around(self, step: Callable[[], Tensor | float]) -> tuple[float, float, float, float]:
        self.job.barrier()
        sent, cpu, started = self._sent(), time.process_time(), time.perf_counter()
        loss = step()
        self.job.synchronize()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.job.barrier()  # what has not left yet leaves before it
        return float(loss), seconds, cpu, self._sent() - sent

    def _sent(self) -> float:
        return bytes_sent(self.interface) if self.interface else 0.0


def no_step() -> float:
    return 0.0


def bytes_sent(interface: str) -> float:
    """Bytes that `interface` has sent, headers included; see proc_pid_net(5)."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return float(counts.split()[8])
    raise UsageError(f"--interface {interface} is none of this machine's; see `ip link`")
