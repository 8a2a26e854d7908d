"""A trace of requests and what became of it: drawn, served by paged_engine, reported."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from distlab.errors import UsageError
from distlab.model import SIZES, Llama, save
from distlab.script import Run

NAMES = ("a request", "the next in its slot")


@dataclass(eq=False)
class Job:
    """A request on the server's clock, in seconds, and what has been done of it, in tokens."""

    arrival: float
    prompt: int
    output: int
    written: int = 0
    computed: int = 0  # tokens whose keys and values are in the cache
    started: float = 0.0  # when the step began that gave the first token
    finished: float = 0.0
    tokens: list[int] = field(default_factory=list)  # where they are really computed


def draw_lengths(args: Namespace) -> np.ndarray:
    """Prompt and output lengths [requests, 2]: lognormal with a spread (of the logarithm) of 1."""
    location = np.log([args.prompt_mean, args.output_mean]) - 0.5
    drawn = np.random.default_rng(args.seed).lognormal(location, 1.0, (args.requests, 2))
    return np.clip(np.rint(drawn), 1, args.longest).astype(int)


def make_jobs(arrivals: np.ndarray, lengths: np.ndarray) -> list[Job]:
    return [
        Job(float(arrival), int(prompt), int(output))
        for arrival, (prompt, output) in zip(arrivals, lengths, strict=True)
    ]


class MeasuredEngine:
    """paged_engine with float32 weights, greedy; `seconds` has the time of each step so far.

    Prefix caching is off and the cache large enough for all slots: only the policy matters here.
    """

    def __init__(self, directory: str, args: Namespace) -> None:
        from paged_engine.config import EngineConfig
        from paged_engine.engine import Engine

        longest = 2 * args.longest + 1
        self.engine = Engine(
            EngineConfig(
                directory,
                dtype="float32",
                device=args.device,
                num_blocks=2 * args.slots * (longest // 16 + 1),
                max_batch_tokens=args.budget,
                max_sequences=args.slots,
                prefix_caching=False,
            )
        )
        if self.engine.max_model_len < 2 * args.longest:
            limit = self.engine.max_model_len
            self.engine.close()
            raise UsageError(
                f"--longest {args.longest} tokens of prompt and as many of output are more than "
                f"the {limit} of --model {args.model}; use at most {limit // 2}"
            )
        self.vocabulary = self.engine.runner.config.vocab_size
        self.description = self.engine.runner.description
        self.seconds: list[float] = []
        self.jobs: dict[str, Job] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.engine.close()

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add(self, job: Job) -> None:
        """The prompt's tokens depend on the job alone, so that every policy asks the same."""
        from paged_engine.sampling_params import SamplingParams

        drawn = np.random.default_rng([job.prompt, job.output])
        prompt = drawn.integers(self.vocabulary, size=job.prompt).tolist()
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=job.output)
        self.jobs[self.engine.add_request(prompt, params)] = job

    def step(self) -> tuple[list[Job], float]:
        started = time.perf_counter()
        outputs = self.engine.step()
        self.seconds.append(time.perf_counter() - started)
        for output in outputs:
            job = self.jobs[output.request_id]
            job.tokens += output.token_ids
            job.written = len(job.tokens)
        return [self.jobs[output.request_id] for output in outputs], self.seconds[-1]


@contextmanager
def model_directory(args: Namespace) -> Iterator[str]:
    """The folder of --model; a size is made with random weights and deleted again."""
    if args.model not in SIZES:
        yield args.model
        return
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        yield str(save(Llama(SIZES[args.model]), Path(folder) / args.model))


def fit_cost(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The coefficients, none negative, of the columns of `steps` [steps, 3] that give `seconds`.

    Steps that took more than three times as long as a first fit says are left out: the first ones
    of an engine, and those that something else interrupted.
    """
    kept = seconds < 3 * steps @ _least_squares(steps, seconds)
    return _least_squares(steps[kept], seconds[kept])


def _least_squares(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares; a column whose coefficient would be negative is left out. On a small model
    noise hides what attention costs."""
    kept = list(range(steps.shape[1]))
    while True:
        fitted, *_ = np.linalg.lstsq(steps[:, kept], seconds)
        if fitted.min() >= 0:
            break
        del kept[int(fitted.argmin())]
    cost = np.zeros(steps.shape[1])
    cost[kept] = fitted
    return cost


@dataclass(frozen=True)
class Served:
    """A trace that was served: its jobs, the sequences that got a token in each step, and the
    seconds from the first arrival to the last answer."""

    jobs: Sequence[Job]
    slots: int
    busy: list[int]
    seconds: float

    @property
    def latencies(self) -> np.ndarray:
        return np.array([job.finished - job.arrival for job in self.jobs])

    @property
    def busy_percent(self) -> float:
        """Slots that gave a token, mean over the steps."""
        return 100 * float(np.mean(self.busy)) / self.slots

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return sum(job.output for job in self.jobs) / self.seconds


def show(run: Run, served: Mapping[tuple[str, str], Served], args: Namespace) -> None:
    rows = []
    for (policy, how), one in served.items():
        p50, p99 = np.percentile(one.latencies, [50, 99])
        rows.append([policy, how, len(one.busy), one.busy_percent, one.throughput,
                     *(1e3 * t for t in (one.latencies.mean(), p50, p99))])  # fmt: skip
    run.table(
        "policies",
        ["batching", "how", "steps", "slots busy %", "tokens/s", "mean latency ms", "p50 ms",
         "p99 ms"],
        rows,
        caption=f"{args.requests} requests at {args.load:g} of the load that continuous batching "
        "can bear",
    )  # fmt: skip
    for policy in ("static", "continuous"):
        simulated, measured = served[policy, "simulated"], served[policy, "engine"]
        run.compare(f"{policy}: throughput", simulated.throughput, measured.throughput, "tok/s")
        run.compare(
            f"{policy}: mean latency", simulated.latencies.mean(), measured.latencies.mean(), "s"
        )
        run.compare(f"{policy}: slots busy", simulated.busy_percent, measured.busy_percent, "%")


def draw(run: Run, served: Mapping[tuple[str, str], Served]) -> None:
    series = []
    for policy in ("static", "continuous"):
        for how in ("engine", "simulated"):
            points = 1e3 * np.sort(served[policy, how].latencies)
            share = 100 * np.arange(1, len(points) + 1) / len(points)
            series.append({"label": f"{policy}, {how}", "x": points.tolist(), "y": share.tolist(),
                           "dashed": how == "simulated"})  # fmt: skip
    run.figure(
        "continuous_latency", kind="line", log_x=True, series=series,
        title="One trace, two ways to batch it",
        x_label="latency (ms)", y_label="% of the requests answered within it",
    )  # fmt: skip
    run.figure(
        "continuous_slots", kind="timeline",
        title="Static batching leaves slots empty (the middle of the trace)",
        x_label="time (s)", y_label="slot",
        series=[row for policy in ("static", "continuous")
                for row in slot_rows(policy, served[policy, "engine"])],
    )  # fmt: skip


def slot_rows(policy: str, served: Served) -> list[dict[str, Any]]:
    """At most eight slots, and who was in them while the middle jobs of the trace were served.

    A job takes the first slot that is free; the first jobs' place in line does not matter.
    """
    shown = min(8, served.slots)
    count = len(served.jobs)
    middle = served.jobs[count // 3 : count // 3 + 4 * shown]
    begin, end = min(job.started for job in middle), max(job.started for job in middle)
    slots: list[list[Job]] = [[] for _ in range(served.slots)]
    for job in sorted(served.jobs, key=lambda job: job.started):
        free = (jobs for jobs in slots if not jobs or jobs[-1].finished <= job.started + 1e-9)
        next(free).append(job)
    rows = []
    for index, jobs in enumerate(slots[:shown]):
        spans = [
            (
                [max(job.started, begin), min(job.finished, end)],
                NAMES[i % 2],
            )
            for i, job in enumerate(jobs)
            if job.started < end and job.finished > begin
        ]
        rows.append({"label": f"{policy} {index}", "x": [span for span, _ in spans],
                     "y": [name for _, name in spans]})  # fmt: skip
    return rows
