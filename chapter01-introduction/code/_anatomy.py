"""One step, operator by operator: its FLOPs, the bytes it moves, and the memory alive after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from distlab.measure import LiveBytes, measure, tensors_in

BURST = 200
CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # not in torch's flop_registry


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
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
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


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    name = func._overloadpacket.__name__
    if name == CPU_ATTENTION:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if name == f"{CPU_ATTENTION}_backward":
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that the operator changes in place."""
    declared = func._schema.arguments
    changed = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    named = {a.name: value for a, value in zip(declared, args, strict=False)} | kwargs
    return tensors_in([value for name, value in named.items() if name in changed])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors; an expanded one has no more than its storage holds."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
