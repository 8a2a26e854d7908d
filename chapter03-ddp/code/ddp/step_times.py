"""What a step of data-parallel training should take, and what it takes in its parts.

Predicted: a bucket's bytes can go when its last gradient is there and those of the bucket before it
are through, since they share one link. What is not over when backward is sticks out, and the
optimizer waits for it. Sending is not free for the processor: system calls, copies, the sum. Where
the ranks have no core to spare for that, as on a cluster of namespaces, backward stands still
meanwhile: overlap hides waiting, not work.

Measured: a step with nothing sent, messages with nothing computed, and both at once.
"""

import time
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlab import host, predict
from distlab.cluster.links import parse_rate
from distlab.errors import UsageError
from distlab.predict.communication import BUS_FACTORS
from distlab.ranks import gathered
from distlab.run import Run
from distlab.runtime import Runtime

MIB = 2**20
FIRST_BUCKET = 1 * MIB  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
DEFAULT_BUCKET = 25 * MIB
GLOO_THREADS = 2  # of a process group of torch's (ProcessGroupGloo::Options)
SMALL, LARGE = 4 * 2**10, 4 * MIB  # bytes of the all-reduces that are timed alone


@dataclass(frozen=True)
class Alone:
    """A step with nothing sent: seconds, and when each gradient is there."""

    forward: float
    backward: float
    optimizer: float
    order: tuple[int, ...]  # of arrival: each gradient's place among the parameters
    sizes: tuple[int, ...]  # bytes of each gradient, in that order
    ready: tuple[float, ...]  # seconds from the beginning of backward, in that order

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.optimizer

    @property
    def gradient_bytes(self) -> int:
        return sum(self.sizes)

    @staticmethod
    def slowest(ranks: Sequence["Alone"]) -> "Alone":
        """Of each number the largest of all ranks: what the others wait for."""
        numbers = {
            field.name: np.max([getattr(rank, field.name) for rank in ranks], axis=0).tolist()
            for field in fields(Alone)
        }
        return Alone(**{**numbers, "order": ranks[0].order, "sizes": ranks[0].sizes})


@dataclass(frozen=True)
class Wire:
    """An all-reduce of n bytes alone takes latency + n·per_byte seconds.

    So many `lanes` are under way at once, gloo's threads: they share the link, but the latency of
    one is hidden behind the bytes of another. `work` + n·`work_per_byte` are seconds of a core that
    the rank cannot compute in meanwhile.
    """

    latency: float
    per_byte: float
    work: float = 0.0
    work_per_byte: float = 0.0
    lanes: int = 1

    def seconds(self, n: float) -> float:
        return self.latency + n * self.per_byte

    def working(self, n: float) -> float:
        return self.work + n * self.work_per_byte


@dataclass(frozen=True)
class Bucket:
    """Bytes, and the second of backward in which the last of its gradients is there."""

    size: int
    ready: float


@dataclass(frozen=True)
class Predicted:
    """A step with one division into buckets, seconds."""

    step: float
    sent: float  # all buckets, as if one after another
    sticks_out: float  # from the end of backward to the last gradient's arrival
    latency: float  # of all buckets; it is part of `sent`


def seconds_per_byte(bits_per_s: float, workers: int) -> float:
    """Of a ring all-reduce's buffer, over links of so many bits per second each way."""
    return float(BUS_FACTORS["all_reduce"](workers)) / predict.tcp_goodput(bits_per_s)


def balancing_rate(n: float, seconds: float, workers: int) -> float:
    """Bits per second of the links over which an all-reduce of n bytes takes so many seconds."""
    return seconds_per_byte(1.0, workers) * n / seconds


def bucket_limits(cap_mib: float | None) -> tuple[int, ...]:
    """The sizes at which DDP closes its first bucket, its second, …; the last holds for the rest.

    Without `bucket_cap_mb` the first is smaller, so that the link has something to do early; with
    it all have the size that was asked for.
    """
    return (FIRST_BUCKET, DEFAULT_BUCKET) if cap_mib is None else (int(cap_mib * MIB),)


def ddp_buckets(alone: Alone, limits: Sequence[int]) -> list[Bucket]:
    """The buckets that DDP makes after its first step, when it knows the order of arrival.

    A bucket is closed once it holds its limit or more, so the limit is not an upper one, and a
    gradient larger than it is not cut (compute_bucket_assignment_by_size, reducer.cpp).
    """
    buckets: list[Bucket] = []
    held = 0
    last = len(alone.sizes) - 1
    for index, (size, ready) in enumerate(zip(alone.sizes, alone.ready, strict=True)):
        held += size
        if held >= limits[min(len(buckets), len(limits) - 1)] or index == last:
            buckets.append(Bucket(held, ready))
            held = 0
    return buckets


def predict_step(
    alone: Alone, wire: Wire, buckets: Sequence[Bucket], overlap: bool = True
) -> Predicted:
    """The step with these buckets, sent in their order; without overlap, after backward."""
    passed, done = [0.0], [0.0]  # seconds since backward began, and how many of its own it has done
    ends = [0.0] * wire.lanes  # of the buckets before

    def go_on(seconds: float, for_backward: float) -> None:
        passed.append(passed[-1] + seconds)
        done.append(min(alone.backward, done[-1] + for_backward))

    for bucket in buckets:
        wanted = bucket.ready if overlap else alone.backward
        if wanted > done[-1]:  # the link is idle until the bucket's last gradient is there
            go_on(wanted - done[-1], wanted - done[-1])
        reached = bisect_left(done, wanted) + 1
        ready = float(np.interp(wanted, done[:reached], passed[:reached]))
        begin = max(ready, ends[-wire.lanes]) + wire.latency
        if begin > passed[-1]:
            go_on(begin - passed[-1], begin - passed[-1])
        work = wire.working(bucket.size)
        taken = max(work, bucket.size * wire.per_byte)
        go_on(taken, taken - work)
        ends.append(passed[-1])
    now = passed[-1] + alone.backward - done[-1]
    return Predicted(
        step=alone.forward + now + alone.optimizer,
        sent=sum(wire.seconds(bucket.size) for bucket in buckets),
        sticks_out=now - alone.backward,
        latency=len(buckets) * wire.latency,
    )


class Trainee:
    """A model in its wrapper and its own batch, trained by SGD, whose step is the gradient's.

    With a learning rate of 0 every step has the same gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        batch: tuple[Tensor, Tensor] | None = None,
        learning_rate: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self.wrapped, self.batch = wrapped, batch
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, learning_rate, momentum)

    def step(self, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """One step on `batch`, or on the own one; its mean loss."""
        self.optimizer.zero_grad()
        loss = self.forward(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forward(self, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The mean loss."""
        chosen = batch or self.batch
        assert chosen is not None
        input_ids, targets = chosen
        loss: Tensor = self.wrapped(input_ids, targets=targets)
        return loss

    def gradient(self) -> Tensor:
        """Of the last step, [parameters]."""
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


def own_batch(
    args: Namespace, job: Runtime, vocabulary: int, sequences: int
) -> tuple[Tensor, Tensor]:
    """Each rank its own, always the same: input_ids and targets, [sequences, seq]."""
    generator = torch.Generator().manual_seed(args.seed + job.rank)
    size = (sequences, args.seq_len + 1)
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
        return Alone.slowest(gathered(own))


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
    longest = np.max(gathered(own), axis=0)
    return float(longest[0]), float(longest[1])


def check_gradients(
    run: Run, job: Runtime, local: Trainee, trainees: Sequence[Trainee], most: float = 1e-6
) -> None:
    """Every one's last gradient must be the mean of the ranks' own, by one all-reduce of it."""
    mean = local.gradient() / job.world_size
    dist.all_reduce(mean)
    own = max(float((one.gradient() - mean).abs().max()) for one in trainees)
    worst = max(gathered(own))
    run.check_below("largest difference of a gradient to the mean of the ranks' own", worst, most)


def refuse_one_rank(job: Runtime) -> None:
    if job.world_size == 1:
        raise UsageError("one rank sends nothing; use torchrun --nproc_per_node=2 or more")
