"""Task 4, read-profile: where the time of a training step goes, read from a Chrome trace."""

import json
from pathlib import Path

Interval = tuple[float, float]


def time_shares(trace: Path) -> dict[str, float]:
    """Each cause gets the time that it covers beyond the causes before it."""
    events = [
        e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"
    ]
    annotations = [e for e in events if e["cat"] == "user_annotation"]
    kernels = [e for e in events if e["cat"] == "kernel"]
    steps = intervals(e for e in annotations if e["name"].startswith("ProfilerStep#"))
    window = (min(start for start, _ in steps), max(end for _, end in steps))
    causes = {
        "compute": intervals(e for e in kernels if not e["name"].startswith("nccl")),
        "communication": intervals(e for e in kernels if e["name"].startswith("nccl")),
        "input": intervals(e for e in annotations if e["name"] == "data"),
        "launch": [window],
    }
    length = window[1] - window[0]
    explained: list[Interval] = []
    shares = {}
    for cause, found in causes.items():
        before = covered(explained, window)
        explained += found
        shares[cause] = (covered(explained, window) - before) / length
    return shares


def bottleneck(trace: Path) -> str:
    shares = time_shares(trace)
    return max(shares, key=lambda cause: shares[cause])


def intervals(events) -> list[Interval]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def covered(found: list[Interval], window: Interval) -> float:
    """The length of the intervals' union within the window."""
    total, reached = 0.0, window[0]
    for start, end in sorted(found):
        start, end = max(start, reached), min(end, window[1])
        total += max(end - start, 0.0)
        reached = max(reached, end)
    return total
