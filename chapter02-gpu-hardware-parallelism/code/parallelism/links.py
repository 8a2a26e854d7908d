"""What a collective should take: from a link's rate and delay, or from a line fitted to times.

A collective of n bytes on K ranks takes steps·alpha + share·n·beta seconds, where alpha is one
message's latency and beta the seconds per byte of a link; `distlab.predict` has each formula. Two
things are known of gloo's own all-reduce (gloo/allreduce.cc, transport/tcp/pair.cc) and matter
where a link has a delay:
- it is a ring whose shares are cut into segments, at least two for each rank, of at most 1 MiB;
- a segment leaves only when its receiver has said that it waits for it, and a rank waits for two at
  a time. A receiver says so when it has the last but one; and its word queues behind the segment
  that it is sending itself. So two segments take a round trip at least, and where a segment takes
  longer than a message's latency the link idles for that latency after each.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distlab import measure, predict
from distlab.display import number, quantity
from distlab.model import Llama, num_parameters
from distlab.ranks import distinct, gathered
from distlab.run import Run
from distlab.runtime import Runtime

MAX_SEGMENT = 2**20  # bytes; AllreduceOptions::kMaxSegmentSize
Formula = Callable[[float, int, float, float], float]


@dataclass(frozen=True)
class Link:
    """Every rank's link: bits per second, and seconds that a message takes besides its bytes.

    These are the link's delay one way, and what the hosts add: system calls, threads that wake up
    and wait for a core. The hosts' part is measured, by messages of 4 bytes; it does not depend on
    what is predicted. `burst` is what the link passes at once after a pause, in bytes: the bucket
    of the shaper that makes it slow (tc-tbf(8)); a real link has none.
    """

    rate: float
    delay: float
    hosts: float = 0.0
    burst: float = 0.0

    @property
    def cost(self) -> tuple[float, float]:
        """(alpha, beta); of the rate, 1448 of 1514 bytes carry data (TCP/IP headers)."""
        alpha, beta = predict.tcp_link(self.rate, self.delay)
        return alpha + self.hosts, beta

    def seconds(self, collective: str, n: float, workers: int, backend: str) -> float:
        if collective == "all_reduce" and backend == "gloo":
            alpha, beta = self.cost
            return gloo_all_reduce(n, workers, alpha, beta, self.burst * beta)
        return formula(collective, backend)(n, workers, *self.cost)


def gloo_all_reduce(
    n: float, workers: int, alpha: float, beta: float, bucket: float = 0.0
) -> float:
    """Seconds of gloo's segmented ring with its handshake: a reduce-scatter, then an all-gather.

    Without latency it is the ring's 2·(K - 1)/K·n·beta. For a single number, which each rank hands
    on, the receivers' words are always there already. `bucket` is how many seconds of sending the
    link makes up for at once after a pause as long.
    """
    segments = max(math.ceil(n / MAX_SEGMENT), 2 * workers)
    segments = math.ceil(segments / workers) * workers
    if workers == 1 or n < 4 * segments:
        return predict.ring_all_reduce(n, workers, alpha, beta)
    passed_on = segments - segments // workers  # by each rank, in each of the two phases
    return 2 * _phase(passed_on, n / segments * beta, alpha, bucket)


def _phase(count: int, segment: float, alpha: float, bucket: float) -> float:
    """Seconds until the last of `count` segments has come, each of which a link sends in `segment`.

    All ranks keep the same time, so one is enough: what it sends, its neighbour sends it. It asks
    for a segment when it has the last but one. The word for that waits behind what the own link
    has still to send, and then takes alpha, as the segment does that answers it.
    """
    begun = math.inf  # when the last segment was given to the link; none yet
    sent = [-alpha]  # the phase before ended when its last segment came
    for index in range(count):
        asked = sent[index - 1] + alpha if index > 1 else 0.0
        begun = (max(asked, sent[-1]) if begun <= asked else asked) + alpha
        pause = max(0.0, begun - sent[-1])
        sent.append(sent[-1] + pause + max(0.0, segment - min(bucket, pause)))
    return sent[-1] + alpha


def formula(collective: str, backend: str) -> Formula:
    """The alpha-beta formula of the algorithm that the back end takes for large messages."""
    return {**_FORMULAS, **(_GLOO if backend == "gloo" else {})}[collective]


def _gloo_reduce(n: float, workers: int, alpha: float, beta: float) -> float:
    """A ring reduce-scatter, then every rank sends its share to the root, all at once."""
    share = n / workers * beta if workers > 1 else 0.0
    first = predict.ring_reduce_scatter(n, workers, alpha, beta)
    return first + (alpha if workers > 1 else 0.0) + share


def _neighbours(n: float, workers: int, alpha: float, beta: float) -> float:
    return predict.point_to_point(n, alpha, beta) if workers > 1 else 0.0


_FORMULAS: dict[str, Formula] = {
    "all_reduce": predict.ring_all_reduce,
    "all_gather": predict.ring_all_gather,
    "reduce_scatter": predict.ring_reduce_scatter,
    "broadcast": predict.chain_broadcast,
    "reduce": predict.chain_broadcast,
    "all_to_all": predict.pairwise_all_to_all,
    "sendrecv": _neighbours,
}
_GLOO: dict[str, Formula] = {
    "reduce_scatter": predict.ring_all_reduce,  # torch all-reduces all of it and keeps a share
    "broadcast": predict.tree_broadcast,
    "reduce": _gloo_reduce,
}


@dataclass(frozen=True)
class Fit:
    """seconds = fixed + slope·bytes, each with half its 95 % interval."""

    fixed: float
    slope: float
    fixed_range: float
    slope_range: float

    def seconds(self, n: float) -> float:
        return self.fixed + self.slope * n


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """Least squares over relative errors, so that 4 bytes count as much as 64 MiB.

    None for fewer than four sizes: a line through two points has no error to tell of.
    """
    if len(sizes) < 4:
        return None
    times = np.array(seconds)
    # ((fixed + slope·n) - t) / t, squared and summed, is least
    design = np.stack([1 / times, np.array(sizes) / times], axis=1)
    solution, *_ = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)
    freedom = len(times) - 2
    variance = float(np.sum((design @ solution - 1) ** 2)) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    half = student_t(freedom) * errors
    return Fit(float(solution[0]), float(solution[1]), float(half[0]), float(half[1]))


def left_out(sizes: Sequence[float], seconds: Sequence[float]) -> list[float | None]:
    """For each size, what a line fitted to all the others predicts."""
    predictions: list[float | None] = []
    for index, n in enumerate(sizes):
        others = [i for i in range(len(sizes)) if i != index]
        line = fit_line([sizes[i] for i in others], [seconds[i] for i in others])
        predictions.append(line.seconds(n) if line else None)
    return predictions


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 4 % from 2 degrees of freedom on.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z = 1.959964
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / freedom**power for power, term in enumerate(terms))


def alpha_and_beta(line: Fit, collective: str, workers: int, backend: str) -> str:
    """The fitted line in terms of one message and one link, in words."""
    cost = formula(collective, backend)
    steps, share = cost(0.0, workers, 1.0, 0.0), cost(1.0, workers, 0.0, 1.0)
    alpha, alpha_range = line.fixed / steps, line.fixed_range / steps
    beta, beta_range = line.slope / share * 1e9, line.slope_range / share * 1e9
    return (
        f"alpha = {quantity(alpha, 's')} ± {quantity(alpha_range, 's')} for each of {steps:g} "
        f"messages, beta = {number(beta)} ± {number(beta_range)} ns/B, 1/beta = "
        f"{quantity(share / line.slope, 'B/s')}"
    )


@dataclass(frozen=True)
class Measured:
    """Medians over the steps, of the slowest rank's seconds in each step."""

    compute: float  # nothing sent; on all ranks at once
    step: float
    all_reduce: float  # of the last rank to begin it, so that no waiting is in it
    gradient_bytes: int


class Replica:
    """A model with plain SGD, and its gradient as one flat tensor."""

    def __init__(self, model: Llama) -> None:
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
            parameter.sub_(learning_rate * piece.view_as(parameter))


def measure_steps(
    run: Run, args: Namespace, job: Runtime, replica: Replica, asleep: float | None = None
) -> Measured:
    """Train `args.steps` steps after one that is not timed; each beside its compute alone.

    With `asleep` seconds given, every rank sleeps so long where it would compute.

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
        if asleep is not None:
            seconds.append(step_beside_sleep(replica, batch, job, asleep))
        else:
            seconds.append(timed_step(replica, batch, job))
    run.check_equal("all ranks hold the same weights, bit for bit", distinct(replica.parameters), 1)
    everyone = np.array(gathered(seconds[1:]))  # [ranks, steps, 3]
    compute, step, waited = (everyone[:, :, kind] for kind in range(3))
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


def message_latency(job: Runtime) -> float:
    """Seconds that one message takes besides its bytes, from an all-reduce of 4 bytes.

    It consists of 2·(K - 1) messages, one after another. The fastest of 20 calls counts: what other
    work adds to the others is not the hosts'.
    """
    if job.world_size == 1:
        return 0.0
    number = torch.zeros(1, device=job.device)
    timing = measure.measure(lambda: dist.all_reduce(number), 3, 20, job.device)
    return max(gathered(min(timing.samples))) / (2 * (job.world_size - 1))
