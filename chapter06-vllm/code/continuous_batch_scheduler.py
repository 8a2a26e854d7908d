"""Static against continuous batching on one trace of arrivals: simulated, then done by the engine.

A static batch is formed, computed and answered as one: nobody joins until its longest answer is
complete, and the slots of the shorter ones stay empty. Continuous batching decides anew before
each step (each "iteration"): who has finished leaves, who waits takes the slot. The whole
difference is one condition, in `serve` below.

An engine without a model is simulated first, its step costing fixed + a · tokens computed +
b · tokens attended to, fitted to this machine's paged_engine. Then paged_engine itself serves the
same trace with the same two policies. Its steps are really computed and timed; only idle time is
skipped.

Run:
    python chapter06-vllm/code/continuous_batch_scheduler.py --figures build/figures
    python chapter06-vllm/code/continuous_batch_scheduler.py --slots 16 --load 0.5

You should see: the same tokens whichever way they are batched; a static batch keeps mean / longest
of its slots busy, so the more the lengths differ the worse; and at a load that continuous batching
bears well the static queue grows from request to request. Finished sequences cost nothing here;
where they are computed on as padding, as in plain `generate`, static batching is worse.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models",
OSDI 2022, section 3.1.
"""

from argparse import Namespace
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distlab import script
from distlab.model import SIZES
from distlab.queueing import poisson_arrivals
from distlab.script import Run, UsageError
from inference.batching import (
    Job,
    MeasuredEngine,
    Served,
    draw,
    draw_lengths,
    fit_cost,
    make_jobs,
    model_directory,
    show,
)

PRESETS = {
    "smoke": {"model": "smoke", "requests": 24, "slots": 4, "prompt_mean": 12.0,
              "output_mean": 8.0, "longest": 64},
    "laptop": {"model": "laptop", "requests": 120, "slots": 8, "prompt_mean": 32.0,
               "output_mean": 32.0, "longest": 256},
    "gpu": {"model": "gpu", "requests": 512, "slots": 64, "prompt_mean": 160.0,
            "output_mean": 128.0, "longest": 1024},
}  # fmt: skip
POLICIES = ("static", "continuous")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    lengths = draw_lengths(args)
    with script.run(args) as run, model_directory(args) as directory:
        with MeasuredEngine(directory, args) as engine:
            run.print(f"machine: {engine.description}")
            cost = calibrate(run, args, lengths, engine)
            arrivals = choose_arrivals(run, args, lengths, cost)
            served = {
                (policy, how): serve(make_jobs(arrivals, lengths), one, args.slots, policy)
                for policy in POLICIES
                for how, one in (("simulated", SimulatedEngine(args, cost)), ("engine", engine))
            }
        show(run, served, args)
        check(run, served)
        draw(run, served)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    number: dict[str, Any] = {"type": script.positive_float}
    parser.add_argument("--model", metavar="SIZE|DIR", help=f"{', '.join(SIZES)} with random "
                        "weights, or the folder of a model")  # fmt: skip
    parser.add_argument("--requests", **positive)
    parser.add_argument("--slots", **positive, help="sequences computed together, at most")
    parser.add_argument("--budget", **positive, default=256, help="tokens in a step, at most")
    parser.add_argument("--load", type=script.fraction, default=0.9, help="arrivals, as a share of "
                        "what continuous batching can answer")  # fmt: skip
    parser.add_argument("--prompt-mean", **number, help="tokens; the lengths are lognormal")
    parser.add_argument("--output-mean", **number, help="tokens")
    parser.add_argument("--longest", **positive, help="tokens of prompt and output, each at most")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.load < 1:
        raise UsageError(f"--load {args.load:g} has no steady state; use one between 0 and 1")
    if args.slots < 2:
        raise UsageError("--slots 1 batches nothing; use at least 2")
    if args.requests < 2 * args.slots:
        raise UsageError(
            f"--requests {args.requests} are not two batches of --slots {args.slots}; "
            f"use at least {2 * args.slots}"
        )
    if args.budget < args.slots:
        raise UsageError(f"--budget {args.budget} is less than a token for each of {args.slots} "
                         f"slots; use at least {args.slots}")  # fmt: skip
    if args.model not in SIZES and not Path(args.model).is_dir():
        raise UsageError(f"--model {args.model} is no size and no folder; use {', '.join(SIZES)} "
                         "or a model's folder")  # fmt: skip
    return args


class Engine(Protocol):
    """Something that computes steps: here a simulation, or paged_engine behind the same methods."""

    @property
    def has_work(self) -> bool: ...

    def add(self, job: Job) -> None: ...

    def step(self) -> tuple[list[Job], float]:
        """The jobs that got a token (its `written` tells which), and the seconds that it took."""


def serve(jobs: list[Job], engine: Engine, slots: int, policy: str) -> Served:
    """Give the jobs, in order of arrival, to the engine as the policy says; until all are done."""
    waiting, clock, busy = deque(jobs), 0.0, []
    while waiting or engine.has_work:
        if not engine.has_work:
            clock = max(clock, waiting[0].arrival)  # idle until then
        if policy == "continuous" or not engine.has_work:
            most = len(jobs) if policy == "continuous" else slots
            while waiting and waiting[0].arrival <= clock and most:
                engine.add(waiting.popleft())
                most -= 1
        advanced, seconds = engine.step()
        for job in advanced:
            if job.written == 1:
                job.started = clock
            if job.written == job.output:
                job.finished = clock + seconds
        clock += seconds
        busy.append(len(advanced))
    return Served(jobs, slots, busy, clock - jobs[0].arrival)


class SimulatedEngine:
    """paged_engine's scheduling on one page: running sequences first, then who waits, in order.

    A step computes one token of each sequence that decodes, and of prompts as much as the budget
    leaves. A sequence whose tokens are all computed gets a new one.
    """

    def __init__(self, args: Namespace, cost: np.ndarray) -> None:
        self.slots, self.budget, self.cost = args.slots, args.budget, cost
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.steps: list[tuple[int, int, int]] = []  # 1, tokens computed, tokens attended to

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def step(self) -> tuple[list[Job], float]:
        budget, attended, advanced = self.budget, 0, []
        candidates = [*self.running, *self.waiting]
        for job in candidates[: self.slots]:
            if budget == 0:
                break
            if job not in self.running:
                self.running.append(self.waiting.popleft())
            chunk = min(job.prompt + job.written - job.computed, budget)
            attended += chunk * job.computed + chunk * (chunk + 1) // 2
            budget -= chunk
            job.computed += chunk
            if job.computed == job.prompt + job.written:
                job.written += 1
                advanced.append(job)
        self.running = [job for job in self.running if job.written < job.output]
        self.steps.append((1, self.budget - budget, attended))
        return advanced, float(np.dot(self.cost, self.steps[-1]))


def calibrate(run: Run, args: Namespace, lengths: np.ndarray, engine: MeasuredEngine) -> np.ndarray:
    """Seconds of a step, of a token computed and of one attended to, fitted to the engine's steps.

    All requests are there at once, so the simulated engine and the real one must do the same steps,
    whatever they cost: that they do is checked first.
    """
    done, simulated = {}, SimulatedEngine(args, np.ones(3))
    for policy in POLICIES:
        jobs, again = (make_jobs(np.zeros(args.requests), lengths) for _ in range(2))
        expected = serve(jobs, simulated, args.slots, policy)
        done[policy] = serve(again, engine, args.slots, policy)
        run.check_equal(
            f"{policy}: the engine does the simulation's steps", done[policy].busy, expected.busy
        )
    static, continuous = done.values()
    run.compare(
        "static: slots busy at full load, mean over longest output",
        busy_in_static_batches(lengths[:, 1], args.slots), static.busy_percent, "%",
    )  # fmt: skip
    run.check_below("continuous batching needs fewer steps for the same tokens",
                    len(continuous.busy), len(static.busy), "steps")  # fmt: skip
    cost = fit_cost(np.array(simulated.steps, dtype=float), np.array(engine.seconds))
    for name, value in zip(("step", "token computed", "token attended to"), cost, strict=True):
        run.metric(f"cost of a {name}", value, "s")
    return cost


def busy_in_static_batches(outputs: np.ndarray, slots: int) -> float:
    """Percent: all tokens over `slots` times the steps, as many as each batch's longest output."""
    longest = [max(outputs[i : i + slots]) for i in range(0, len(outputs), slots)]
    return 100 * float(sum(outputs) / sum(longest)) / slots


def choose_arrivals(run: Run, args: Namespace, lengths: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Random arrivals at --load of the rate at which continuous batching answers a full queue."""
    jobs = make_jobs(np.zeros(args.requests), lengths)
    full = serve(jobs, SimulatedEngine(args, cost), args.slots, "continuous")
    rate = args.load * args.requests / full.seconds
    run.metric("arrivals", rate, "requests/s", "a share of what continuous batching can answer")
    return poisson_arrivals(rate, args.requests, args.seed)


def check(run: Run, served: dict[tuple[str, str], Served]) -> None:
    static, continuous = (served[policy, "engine"] for policy in POLICIES)
    run.check_equal(
        "both policies give the same tokens",
        [job.tokens for job in static.jobs], [job.tokens for job in continuous.jobs],
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
