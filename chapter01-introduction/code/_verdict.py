"""Read a profile: where the device's time goes, and so what the step is bound by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

STEP, DATA = "step", "data"
SHORT_US = 50.0  # an operator of a CPU below this is mostly the cost of calling it
BOUND = 0.4  # the share of the step from which a wait, not the work, is the bottleneck
SYNC_CALLS = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy",
)  # fmt: skip

Interval = tuple[float, float]  # begin and end, microseconds


@dataclass(frozen=True)
class Evidence:
    """Shares of the profiled time, which sum to 1, and the operators (on a GPU: kernels) in it."""

    waiting_for_input: float
    blocked_in_sync: float
    launching: float
    computing: float
    operators: int
    seconds: float
    mean_operator_seconds: float


def bottleneck(evidence: Evidence, least_seconds: dict[str, float]) -> str:
    """What the step is bound by: input, sync, launch, compute or memory.

    A wait of `BOUND` of the time comes first. A busy device is bound by what limits the operators
    that need most time at the least (`_anatomy.least_seconds`).
    """
    waits = {
        "input-bound": evidence.waiting_for_input,
        "sync-bound": evidence.blocked_in_sync,
        "launch-bound": evidence.launching,
    }
    longest = max(waits, key=lambda name: waits[name])
    if waits[longest] >= BOUND:
        return longest
    return max(least_seconds, key=lambda name: least_seconds[name])


def read_profile(events: Iterable[Any], blocked_seconds: float) -> Evidence:
    """The evidence in torch.profiler's events of steps that ran inside `record_function("step")`.

    `blocked_seconds`: how long the training thread slept during them outside of `data`; it counts
    on a CPU only, since a GPU's profile shows what the host waited for.
    """
    events = list(events)
    kernels = [
        span(event)
        for event in events
        if event.device_type is DeviceType.CUDA and not event.is_user_annotation
    ]
    if kernels:
        return _of_gpu(events, kernels)
    return _of_cpu(events, 1e6 * blocked_seconds)


def _of_gpu(events: list[Any], kernels: list[Interval]) -> Evidence:
    """A GPU is idle between kernels; what its host did in that gap is the reason.

    It was in the input, or it had waited until the GPU was done before it gave it more to do, or it
    was too slow in launching.
    """
    on_host = [event for event in events if event.device_type is DeviceType.CPU]
    inputs = [span(event) for event in on_host if event.name == DATA]
    returns = [span(event)[1] for event in on_host if event.name in SYNC_CALLS]
    idle = {"input": 0.0, "sync": 0.0, "launch": 0.0}
    busy = merged(kernels)
    for (_, begin), (end, _) in zip(busy, busy[1:], strict=False):
        if overlap((begin, end), inputs) > (end - begin) / 2:
            reason = "input"
        elif any(begin <= moment <= end for moment in returns):
            reason = "sync"
        else:
            reason = "launch"
        idle[reason] += end - begin
    total = busy[-1][1] - busy[0][0]
    return _evidence(idle["input"], idle["sync"], idle["launch"], total, kernels)


def _of_cpu(events: list[Any], blocked: float) -> Evidence:
    """A CPU computes inside of operators; between them Python runs, or the thread sleeps.

    What is shorter than `SHORT_US` counts as the cost of calling, like the time between operators.
    """
    steps = [event for event in events if event.name == STEP]
    thread = steps[0].thread
    inputs = [span(event) for event in events if event.name == DATA]
    operators = _outermost(
        span(event)
        for event in events
        if event.thread == thread and event.name.startswith("aten::")
    )
    operators = [one for one in operators if not overlap(one, inputs)]
    total = sum(end - begin for begin, end in map(span, steps))
    waiting = sum(end - begin for begin, end in inputs)
    inside = sum(end - begin for begin, end in operators)
    short = sum(end - begin for begin, end in operators if end - begin < SHORT_US)
    between = max(0.0, total - waiting - inside)
    sync = min(between, max(0.0, blocked))
    return _evidence(waiting, sync, between - sync + short, total, operators)


def _evidence(
    waiting: float, sync: float, launch: float, total: float, operators: Sequence[Interval]
) -> Evidence:
    return Evidence(
        waiting_for_input=waiting / total,
        blocked_in_sync=sync / total,
        launching=launch / total,
        computing=1 - (waiting + sync + launch) / total,
        operators=len(operators),
        seconds=total / 1e6,
        mean_operator_seconds=sum(end - begin for begin, end in operators) / len(operators) / 1e6,
    )


def span(event: Any) -> Interval:
    """Begin and end of a profiler's event."""
    return event.time_range.start, event.time_range.end


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of the intervals, in order."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


def overlap(one: Interval, others: Iterable[Interval]) -> float:
    """How much of `one` lies in any of `others`, which are apart."""
    return sum(max(0.0, min(one[1], end) - max(one[0], begin)) for begin, end in others)


def _outermost(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals that lie in no other: operators, without those that they call."""
    kept: list[Interval] = []
    for begin, end in sorted(intervals, key=lambda one: (one[0], -one[1])):
        if not kept or begin >= kept[-1][1]:
            kept.append((begin, end))
    return kept
