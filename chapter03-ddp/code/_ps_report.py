"""What a job of `parameter_server.py` says: predictions beside what the log of a training holds."""

import math
from argparse import Namespace
from typing import Any

from _ps_training import ALL_REDUCE, ASYNCHRONOUS, DESIGNS, SYNCHRONOUS, Outcome, median

from distlab import predict
from distlab.cluster.links import parse_rate
from distlab.run import Run
from distlab.runtime import Runtime

FLOAT = 4  # bytes
LINK_COLUMNS = [
    "K", "design", "step* (ms)", "step (ms)", "error %", "sequences/s", "busiest link* (MB)",
    "busiest link (MB)",
]  # fmt: skip
TRAINING_COLUMNS = [
    "K", "straggler", "design", "sequences/s*", "sequences/s", "error %", "staleness mean",
    "staleness max", "loss, same samples", "loss, same time",
]  # fmt: skip
RATE_COLUMNS = ["K", "design", "a gradient's share", "staleness mean", "staleness max", "loss"]


def seconds_per_byte(args: Namespace) -> float | None:
    """Beta of the ranks' link, where it is known."""
    if args.link_rate is None:
        return None
    return predict.tcp_link(parse_rate(args.link_rate, f"--link-rate {args.link_rate}"))[1]


def seconds_per_step(outcome: Outcome, workers: int) -> float:
    """Of K gradients: a step, or at an asynchronous server K updates once all workers have begun.

    Medians of the steps; of an asynchronous server's uneven updates the mean.
    """
    log = outcome.log
    if len(log.times) == log.steps:
        return median([b - a for a, b in zip(log.times, log.times[1:], strict=False)])
    begun = log.times[workers - 1]
    return (log.times[-1] - begun) / (len(log.times) - workers) * workers


def predicted_step(design: str, n: float, compute: list[float], beta: float) -> float:
    """Seconds of K gradients of n bytes, from each worker's seconds of compute: the docstring's."""
    workers = len(compute)
    if design == ALL_REDUCE:
        return max(compute) + predict.ring_all_reduce(n, workers, 0.0, beta)
    if design == SYNCHRONOUS:
        return max(compute) + 2 * workers * n * beta
    together = sum(1 / (alone + 2 * n * beta) for alone in compute)
    return max(workers / together, workers * n * beta)


def report_links(run: Run, args: Namespace, job: Runtime, outcomes: dict[str, Outcome]) -> None:
    """A step of each design, and the bytes over the link that carries most of them."""
    beta, workers = seconds_per_byte(args), job.world_size - 1
    rows = []
    for design, outcome in outcomes.items():
        n = FLOAT * len(outcome.parameters)
        step = seconds_per_step(outcome, workers)
        predicted = None if beta is None else predicted_step(design, n, outcome.compute, beta)
        error = None if predicted is None else 100 * (predicted - step) / step
        several_nodes = job.world_size > job.local_world_size
        moved = max(sum(pair) for pair in outcome.wire) if several_nodes else None
        rows.append([
            workers, design, None if predicted is None else 1e3 * predicted, 1e3 * step, error,
            workers * args.batch_size / step, payload(design, n, args.link_steps, workers) / 1e6,
            None if moved is None else moved / 1e6,
        ])  # fmt: skip
    run.table(
        "links", LINK_COLUMNS, rows,
        caption=f"K gradients of {FLOAT * len(outcomes[ALL_REDUCE].parameters):,} bytes; * "
        "predicted; bytes of all steps, both directions: the server's link, or a worker's",
    )  # fmt: skip


def payload(design: str, n: float, steps: int, workers: int) -> float:
    """Bytes of parameters and gradients that the busiest link carries, both directions together."""
    if design == ALL_REDUCE:
        return 2 * predict.data_parallel_bytes(n, workers) * steps
    rounds = 2 * steps + 1  # the first parameters are no answer to a gradient
    if design == ASYNCHRONOUS:
        rounds += 2  # the gradients that come too late, and the word that it is over
    return rounds * workers * n


def report_training(
    run: Run, args: Namespace, job: Runtime, outcomes: dict[tuple[bool, str], Outcome]
) -> None:
    """Throughput and loss of each design, without and with a straggler."""
    beta, workers = seconds_per_byte(args) or 0.0, job.world_size - 1
    rows: list[list[Any]] = []
    for (straggler, design), outcome in outcomes.items():
        n = FLOAT * len(outcome.parameters)
        sequences = workers * args.batch_size
        measured = sequences / seconds_per_step(outcome, workers)
        predicted = sequences / predicted_step(design, n, outcome.compute, beta)
        # the same time: until the first of the three designs is ready
        until = min(outcomes[straggler, other].log.times[-1] for other in DESIGNS)
        rows.append([
            workers, "yes" if straggler else "no", design, predicted, measured,
            100 * (predicted - measured) / measured, *staleness(outcome),
            outcome.log.curve[-1][2], loss_at(outcome, until),
        ])  # fmt: skip
    run.table(
        "training", TRAINING_COLUMNS, rows,
        caption=f"* predicted; a gradient takes {1e3 * args.pace:g} ms, the straggler's "
        f"{1e3 * args.straggler:g} ms more; {args.steps} steps of {args.batch_size} sequences each",
    )  # fmt: skip
    run.extra(curves=[
        {"design": design, "straggler": straggler, "curve": outcome.log.curve}
        for (straggler, design), outcome in outcomes.items()
    ])  # fmt: skip


def loss_at(outcome: Outcome, until: float) -> float | None:
    """The loss of the last parameters not later than `until` seconds; None before the first."""
    losses = [loss for _, seconds, loss in outcome.log.curve if seconds <= until]
    return losses[-1] if losses else None


def staleness(outcome: Outcome) -> tuple[float, int]:
    values = outcome.log.staleness
    return sum(values) / len(values), max(values)


def report_rates(
    run: Run, args: Namespace, job: Runtime, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    """What staleness costs at a high learning rate; and where the theory has its limit."""
    rows = [
        [job.world_size - 1, design, share, *staleness(outcome), outcome.log.curve[-1][2]]
        for (design, share), outcome in outcomes.items()
    ]
    run.table(
        "rates", RATE_COLUMNS, rows,
        caption=f"Learning rate {args.high_learning_rate:g}, {args.steps} steps of K gradients",
    )  # fmt: skip
    delay = job.world_size - 2
    run.compare(
        f"on a parabola, the largest stable rate times curvature at staleness {delay}",
        stable_rate(delay), largest_stable_rate(delay),
    )  # fmt: skip


def stable_rate(delay: int) -> float:
    """x <- x - rate·(x of `delay` steps ago) dies out below this rate; 2 without delay.

    Source: Levin and May, "A note on difference-delay equations", Theor. Popul. Biol. 9, 1976.
    """
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def largest_stable_rate(delay: int) -> float:
    """The same by trial: bisection over rates, each tried for 2,000 steps."""
    low, high = 0.0, 3.0
    while high - low > 1e-3:
        rate = (low + high) / 2
        values = [1.0] * (delay + 1)
        for _ in range(2000):
            values = [*values[1:], values[-1] - rate * values[0]]
            if abs(values[-1]) > 1e6:
                break
        low, high = (rate, high) if abs(values[-1]) < 1 else (low, rate)
    return low
