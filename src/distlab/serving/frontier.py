"""The frontier of throughput and latency, of settings loaded at several concurrencies."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from distlab.run import Run


class Point(Protocol):
    """One setting at one concurrency; times in seconds."""

    @property
    def setting(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def latency(self) -> float: ...
    @property
    def cached(self) -> int: ...
    def percentile(self, name: str, q: float) -> float: ...


P = TypeVar("P", bound=Point)


def frontier(points: Sequence[P]) -> list[P]:
    """The points that no other beats in both, from the lowest latency to the highest rate."""
    best: list[P] = []
    for point in sorted(points, key=lambda p: (p.latency, -p.rate)):
        if not best or point.rate > best[-1].rate:
            best.append(point)
    return best


def report(run: Run, points: Sequence[P], cached: str, requests: int) -> None:
    """Table `settings` and figure `frontier`; `cached` is the name of that column."""
    best = frontier(points)
    columns = ["setting", "concurrency", "output tok/s", "TTFT p50, ms", "TTFT p99, ms",
               "TPOT p50, ms", cached, "frontier"]  # fmt: skip
    rows = [
        [
            point.setting, point.concurrency, point.rate, *(
                1000 * point.percentile(name, q)
                for name, q in (("ttft", 50), ("ttft", 99), ("tpot", 50))
            ),
            point.cached, "yes" if point in best else "no",
        ]
        for point in points
    ]  # fmt: skip
    run.table("settings", columns, rows, caption=f"{requests} requests at each concurrency")
    run.metric("most_output_tokens", max(point.rate for point in points), "tok/s")
    run.metric("least_latency", min(point.latency for point in points), "s")
    by_setting = {
        name: [p for p in points if p.setting == name]
        for name in dict.fromkeys(point.setting for point in points)
    }
    run.figure(
        "frontier",
        kind="line",
        title="What each setting can do, and the frontier of all",
        x_label="latency of the median request (ms)",
        y_label="output tokens/s",
        series=[
            {
                "label": label,
                "x": [1000 * point.latency for point in members],
                "y": [point.rate for point in members],
                **({"points": True} if label in by_setting else {}),
            }
            for label, members in [("the frontier", best), *by_setting.items()]
        ],
    )
