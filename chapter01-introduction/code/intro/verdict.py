"""What a step is bound by: read from its profile, and from each operator's FLOPs and bytes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from distlab.measure import LiveBytes, measure, tensors_in

STEP, DATA = "step", "data"
SHORT_US = 50.0  # an operator of a CPU below this is mostly the cost of calling it
BOUND = 0.4  # the share of the step from which a wait, not the work, is the bottleneck
SYNC_CALLS = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy",
)  # fmt: skip
BURST = 200  # calls of an operator that has nothing to do
CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # not in torch's flop_registry

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
    that need most time at the least (`least_seconds`).
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


def read_profile(events: Iterable[FunctionEvent], blocked_seconds: float) -> Evidence:
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


def _of_gpu(events: list[FunctionEvent], kernels: list[Interval]) -> Evidence:
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


def _of_cpu(events: list[FunctionEvent], blocked: float) -> Evidence:
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


def span(event: FunctionEvent) -> Interval:
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


@dataclass(frozen=True)
class Operator:
    """One call of an operator: what it computed with, its FLOPs, the bytes it read and wrote."""

    name: str
    dtype: torch.dtype
    flops: int
    bytes_moved: int


class StepAnatomy(LiveBytes):
    """While it is entered, every operator is noted, those of the backward pass too.

    `operators` in the order of their calls; `gradients` and `activations`: bytes alive after each
    (activations and temporaries are all that is neither a gradient nor was there before).
    """

    def __init__(self, parameters: Iterable[torch.Tensor], device: torch.device) -> None:
        super().__init__(device)
        self.parameters = list(parameters)
        self.device = device
        self.operators: list[Operator] = []
        self.gradients: list[int] = []
        self.activations: list[int] = []
        self.marks: dict[str, int] = {}
        if device.type == "cuda":
            self._before = torch.cuda.memory_allocated(device)

    def mark(self, name: str) -> None:
        """Note that what comes next is called `name`."""
        self.marks[name] = len(self.operators)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        read, made = tensors_in((args, kwargs)), tensors_in(out)
        written = self.made + _written(func, args, kwargs)
        if written and "empty" not in func.__name__:  # a view moves nothing, nor does an allocation
            name = func._overloadpacket.__name__
            # A lookup reads the rows that it gives, not the whole table.
            moved = 2 * _nbytes(made) if name == "embedding" else _nbytes(read) + _nbytes(written)
            flops = _flops(func, args, kwargs, out)
            self.operators.append(Operator(name, (read or made)[0].dtype, flops, moved))
            self._sample()
        return out

    def _sample(self) -> None:
        gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        if self.device.type == "cuda":  # the allocator knows the kernels' own work space too
            alive = torch.cuda.memory_allocated(self.device) - self._before
        else:
            alive = self.bytes
        self.gradients.append(gradients)
        self.activations.append(max(0, alive - gradients))


def least_seconds(
    operators: list[Operator], peak: Callable[[torch.dtype], float], bandwidth: float, call: float
) -> dict[str, float]:
    """The least seconds of the operators, summed by what limits them: compute, memory, launch.

    An operator takes at least max(flops / peak, bytes / bandwidth, call): the roofline (Williams,
    Waterman and Patterson, CACM 52(4), 2009) with the time of calling one that does nothing.
    """
    sums = {"compute-bound": 0.0, "memory-bound": 0.0, "launch-bound": 0.0}
    for operator in operators:
        needs = {
            "compute-bound": operator.flops / peak(operator.dtype) if operator.flops else 0.0,
            "memory-bound": operator.bytes_moved / bandwidth,
            "launch-bound": call,
        }
        limit = max(needs, key=lambda name: needs[name])
        sums[limit] += needs[limit]
    return sums


def call_seconds(device: torch.device) -> float:
    """What calling an operator costs here when it has nothing to do."""
    one = torch.zeros(1, device=device)
    burst = measure(lambda: [one.add_(1) for _ in range(BURST)], 1, 5, device)
    return burst.median / BURST


def _flops(func: OpOverload, args: tuple, kwargs: dict, out: Any) -> int:
    name = func._overloadpacket.__name__
    if name == CPU_ATTENTION:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if name == f"{CPU_ATTENTION}_backward":
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _written(func: OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that the operator changes in place."""
    declared = func._schema.arguments
    changed = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    named = {a.name: value for a, value in zip(declared, args, strict=False)} | kwargs
    return tensors_in([value for name, value in named.items() if name in changed])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors; an expanded one has no more than its storage holds."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
