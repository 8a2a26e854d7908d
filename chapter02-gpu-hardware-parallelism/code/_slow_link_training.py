"""Data parallel training without overlap: a gradient, one all-reduce of it, an update; timed."""

import hashlib
import time
from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab import measure
from distlab.model import num_parameters
from distlab.run import Run
from distlab.runtime import Runtime


@dataclass(frozen=True)
class Measured:
    """Medians over the steps, of the slowest rank's seconds in each step."""

    compute: float  # nothing sent; on all ranks at once
    step: float
    all_reduce: float  # of the last rank to begin it, so that no waiting is in it
    gradient_bytes: int


class Replica:
    """A model with plain SGD, and its gradient as one flat tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())

    def gradient(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the mean loss over [batch, seq] tokens; shape [parameters]."""
        self.model.zero_grad()
        self.model(input_ids, targets=targets).backward()
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    @torch.no_grad()
    def update(self, gradient: Tensor, learning_rate: float = 0.01) -> None:
        pieces = gradient.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter -= learning_rate * piece.view_as(parameter)

    def digest(self) -> str:
        """Of all weights, bit for bit."""
        weights = torch.cat([p.detach().flatten() for p in self.parameters])
        return hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()


def measure_steps(run: Run, args: Namespace, job: Runtime, replica: Replica) -> Measured:
    """Train `args.steps` steps after one that is not timed; each beside its compute alone.

    What is compared runs in turns, so that a change of the machine's speed meets both.
    """
    vocabulary = replica.model.config.vocab_size
    generator = torch.Generator().manual_seed(args.seed + job.rank)  # each rank its own batch
    seconds = []
    for _ in run.progress(range(args.steps + 1), "steps"):
        tokens = torch.randint(
            vocabulary, (args.batch_size, args.seq_len + 1), generator=generator
        ).to(job.device)
        batch = tokens[:, :-1], tokens[:, 1:]
        if args.compute:
            seconds.append(step_beside_sleep(replica, batch, job, args.compute))
        else:
            seconds.append(timed_step(replica, batch, job))
    digests: list[str | None] = [None] * job.world_size
    dist.all_gather_object(digests, replica.digest())
    run.check_equal("all ranks hold the same weights, bit for bit", len(set(digests)), 1)
    compute, step, waited = of_all_ranks(seconds[1:], job)  # each [ranks, steps]
    return Measured(
        compute=float(np.median(compute.max(axis=0))),
        step=float(np.median(step.max(axis=0))),
        all_reduce=float(np.median(waited.min(axis=0))),
        gradient_bytes=4 * num_parameters(replica.model),
    )


def timed_step(
    replica: Replica, batch: tuple[Tensor, Tensor], job: Runtime
) -> tuple[float, float, float]:
    """Seconds of the compute, of a whole step, and of the all-reduce within it."""
    job.barrier()
    started = time.perf_counter()
    replica.update(replica.gradient(*batch), learning_rate=0.0)
    job.synchronize()
    compute = time.perf_counter() - started

    job.barrier()
    started = time.perf_counter()
    gradient = replica.gradient(*batch)
    job.synchronize()
    begun = time.perf_counter()
    dist.all_reduce(gradient)
    job.synchronize()
    reduced = time.perf_counter()
    replica.update(gradient / job.world_size)
    job.synchronize()
    return compute, time.perf_counter() - started, reduced - begun


def step_beside_sleep(
    replica: Replica, batch: tuple[Tensor, Tensor], job: Runtime, compute: float
) -> tuple[float, float, float]:
    """The same, as if every rank had its own processor: the clock runs while all of them sleep."""
    gradient = replica.gradient(*batch)
    job.synchronize()
    job.barrier()
    started = time.perf_counter()
    time.sleep(compute)
    begun = time.perf_counter()
    dist.all_reduce(gradient)
    job.synchronize()
    ended = time.perf_counter()
    replica.update(gradient / job.world_size)
    return compute, ended - started, ended - begun


def of_all_ranks(seconds: list[tuple[float, float, float]], job: Runtime) -> list[np.ndarray]:
    """The compute, the step and the all-reduce, each [ranks, steps], on every rank."""
    own = torch.tensor(seconds, dtype=torch.float64, device=job.device)
    gathered = [torch.empty_like(own) for _ in range(job.world_size)]
    dist.all_gather(gathered, own)
    times = torch.stack(gathered).cpu().numpy()  # [ranks, steps, 3]
    return [times[:, :, kind] for kind in range(3)]


def message_latency(job: Runtime) -> float:
    """Seconds that one message takes besides its bytes, from an all-reduce of 4 bytes.

    It consists of 2·(K - 1) messages, one after another. The fastest of 20 calls counts: what other
    work adds to the others is not the hosts'.
    """
    if job.world_size == 1:
        return 0.0
    number = torch.zeros(1, device=job.device)
    timing = measure.measure(lambda: dist.all_reduce(number), 3, 20, job.device)
    fastest = torch.tensor(min(timing.samples), dtype=torch.float64, device=job.device)
    dist.all_reduce(fastest, dist.ReduceOp.MAX)
    return float(fastest) / (2 * (job.world_size - 1))
