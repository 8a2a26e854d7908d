"""What a step of data parallel training should take: buckets along backward, one link for all.

A bucket's bytes can go when its last gradient is there and those of the bucket before it are
through, since they share one link. What is not over when backward is sticks out, and the optimizer
waits for it. Sending is not free for the processor: system calls, copies, the sum. Where the ranks
have no core to spare for that, as on a cluster of namespaces, backward stands still meanwhile:
overlap hides waiting, not work.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from distlab import predict
from distlab.predict.communication import BUS_FACTORS

MIB = 2**20
FIRST_BUCKET = 1 * MIB  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
DEFAULT_BUCKET = 25 * MIB


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
