"""Measure a training step in its parts: nothing sent, only sent, and as DDP does both at once."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _bucket_model import MIB, Alone, Wire, seconds_per_byte
from torch import Tensor, nn

from distlab import host, measure
from distlab.cluster.links import parse_rate
from distlab.errors import UsageError
from distlab.run import Run
from distlab.runtime import Runtime

GLOO_THREADS = 2  # of a process group of torch's (ProcessGroupGloo::Options)
SMALL, LARGE = 4 * 2**10, 4 * MIB  # bytes of the all-reduces that are timed alone


class Trainee:
    """A replica and its batch. With a learning rate of 0 every step has the same gradient."""

    def __init__(self, model: nn.Module, wrapped: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self.wrapped = wrapped
        self.parameters = list(model.parameters())
        self.batch = batch
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    def forward(self) -> Tensor:
        """The mean loss."""
        input_ids, targets = self.batch
        loss: Tensor = self.wrapped(input_ids, targets=targets)
        return loss

    def gradient(self) -> Tensor:
        """Of the last step, [parameters]."""
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


def own_batch(args: Namespace, job: Runtime, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Each rank its own, always the same: input_ids and targets, [batch, seq]."""
    generator = torch.Generator().manual_seed(args.seed + job.rank)
    size = (args.batch_size, args.seq_len + 1)
    tokens = torch.randint(vocabulary, size, generator=generator).to(job.device)
    return tokens[:, :-1], tokens[:, 1:]


class Stopwatch:
    """Marks in time on a device: on a GPU events in its queue, since the CPU runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks that the device has passed."""
        return float(first.elapsed_time(last) / 1e3 if self.on_gpu else last - first)


class LocalStep:
    """A step with nothing sent, and when in backward each gradient is there; for `Alone`."""

    def __init__(self, trainee: Trainee, job: Runtime) -> None:
        self.trainee, self.job = trainee, job
        self.watch = Stopwatch(job.device)
        self.arrivals: list[tuple[int, Any]] = []  # index of the parameter, mark
        self.parts: list[tuple[float, float, float]] = []
        self.ready: list[dict[int, float]] = []
        self.messages: list[dist.Work] | None = None  # those under way beside a step
        for index, parameter in enumerate(trainee.parameters):
            parameter.register_post_accumulate_grad_hook(self._arrived(index))

    def _arrived(self, index: int) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            self.arrivals.append((index, self.watch.mark()))
            if self.messages is not None:
                small = torch.zeros(SMALL // 4, device=parameter.device)
                self.messages.append(dist.all_reduce(small, async_op=True))

        return on_gradient

    def run(self) -> None:
        """One step, measured."""
        self.arrivals.clear()
        self.trainee.optimizer.zero_grad()
        marks = [self.watch.mark()]
        loss = self.trainee.forward()
        marks.append(self.watch.mark())
        loss.backward()
        marks.append(self.watch.mark())
        self.trainee.optimizer.step()
        marks.append(self.watch.mark())
        self.job.synchronize()
        forward, backward, optimizer = map(self.watch.seconds, marks[:-1], marks[1:])
        self.parts.append((forward, backward, optimizer))
        self.ready.append({i: self.watch.seconds(marks[1], mark) for i, mark in self.arrivals})

    def run_beside_messages(self) -> None:
        """The same step; as each gradient comes, a small all-reduce is begun."""
        self.arrivals.clear()
        self.messages = []
        self.trainee.step()
        for message in self.messages:
            message.wait()
        self.messages = None

    def message_work(self, alone: float, beside: float, latency: float) -> float:
        """Seconds that a message takes from computing, by the two steps' times.

        Of the last one the step waits for the latency too. The messages' number is large, so that
        their cost shows: the threads that wake up, the system calls, the interrupts.
        """
        return max(0.0, beside - alone - latency) / len(self.trainee.parameters)

    def medians(self) -> Alone:
        """Of all steps but the first, which warms up; of each number the slowest rank's."""
        forward, backward, optimizer = np.median(self.parts[1:], axis=0).tolist()
        order = list(self.ready[-1])
        ready = [float(np.median([step[i] for step in self.ready[1:]])) for i in order]
        sizes = [4 * self.trainee.parameters[i].numel() for i in order]
        own = Alone(forward, backward, optimizer, tuple(order), tuple(sizes), tuple(ready))
        return Alone.slowest(of_all_ranks(own, job=self.job))


def measure_wire(args: Namespace, job: Runtime) -> Wire:
    """What an all-reduce costs here: of a known link by its rate, of an unknown one as measured.

    The latency is always measured, with a message so small that the rate does not matter. What a
    message takes from computing is not known here: see `LocalStep.message_work`.
    """
    small, small_work = all_reduce_alone(job, SMALL, 20)
    large, large_work = all_reduce_alone(job, LARGE, 5)
    per_byte = max(0.0, large - small) / (LARGE - SMALL)
    if args.link_rate:
        per_byte = seconds_per_byte(parse_rate(args.link_rate), job.world_size)
    crowded = crowding(args.cores_per_rank or host.usable_cores() / job.local_world_size)
    if job.device.type == "cuda":
        crowded = 0.0  # it computes on another processor
    return Wire(
        latency=max(0.0, small - SMALL * per_byte),
        per_byte=per_byte,
        work_per_byte=crowded * max(0.0, large_work - small_work) / (LARGE - SMALL),
        lanes=GLOO_THREADS if job.backend == "gloo" else 1,
    )


def crowding(cores_per_rank: float) -> float:
    """Which share of the work of sending takes a core from the rank's own computing: 0 to 1.

    None, if there is a core more for each rank than its computing threads take.
    """
    return min(1.0, max(0.0, 1.0 + torch.get_num_threads() - cores_per_rank))


def all_reduce_alone(job: Runtime, n: int, repeats: int) -> tuple[float, float]:
    """Seconds of an all-reduce of n bytes, and of the processor's time in it; the slowest rank's.

    The fastest call counts: what other work adds to the others is not the link's. What the kernel
    does in interrupts, such as the shaper's timer, is in no process's time.
    """
    buffer = torch.zeros(n // 4, device=job.device)
    seconds, work = [], []
    for _ in range(repeats):
        job.barrier()
        worked, started = time.process_time(), time.perf_counter()
        dist.all_reduce(buffer)
        job.synchronize()
        seconds.append(time.perf_counter() - started)
        work.append(time.process_time() - worked)
    own = min(seconds), min(work)
    slowest = np.max(of_all_ranks(own, job), axis=0)
    return float(slowest[0]), float(slowest[1])


def measure_in_turns(
    steps: Sequence[Callable[[], None]], repeats: int, job: Runtime
) -> list[measure.Timing]:
    """Time each of `steps` `repeats` times, in turns; of each step the slowest rank's seconds."""
    seconds = np.empty((len(steps), repeats))
    for repeat in range(repeats):
        for index, step in enumerate(steps):
            job.barrier()
            started = time.perf_counter()
            step()
            job.synchronize()
            seconds[index, repeat] = time.perf_counter() - started
    slowest = np.max(of_all_ranks(seconds, job), axis=0)
    return [measure.Timing(tuple(samples)) for samples in slowest.tolist()]


def check_gradients(
    run: Run, job: Runtime, local: Trainee, trainees: Sequence[Trainee], most: float = 1e-6
) -> None:
    """Every one's last gradient must be the mean of the ranks' own, by one all-reduce of it."""
    mean = local.gradient() / job.world_size
    dist.all_reduce(mean)
    own = max(float((one.gradient() - mean).abs().max()) for one in trainees)
    worst = max(of_all_ranks(own, job))
    run.check_below("largest difference of a gradient to the mean of the ranks' own", worst, most)


def refuse_one_rank(job: Runtime) -> None:
    if job.world_size == 1:
        raise UsageError("one rank sends nothing; use torchrun --nproc_per_node=2 or more")


def of_all_ranks(own: Any, job: Runtime) -> list[Any]:
    """Every rank's `own`, by rank, on every rank."""
    everyone: list[Any] = [None] * job.world_size
    dist.all_gather_object(everyone, own)
    return everyone
