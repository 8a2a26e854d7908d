"""continuous_batch_scheduler.py's results, their table and their figures."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _continuous_trace import Job

from distlab.script import Run

NAMES = ("a request", "the next in its slot")


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
                ("a request", "the next in its slot")[i % 2],
            )
            for i, job in enumerate(jobs)
            if job.started < end and job.finished > begin
        ]
        rows.append({"label": f"{policy} {index}", "x": [span for span, _ in spans],
                     "y": [name for _, name in spans]})  # fmt: skip
    return rows
