"""The collectives as the microbenchmark calls them: a call, its data, and what must come out of it.

The data are small whole numbers, so that every dtype adds them without rounding, in any order. An
element's value follows from its rank and its index alone; so each rank knows the right result
without any communication.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.errors import UsageError
from distlab.runtime import Runtime

# Whole numbers up to which each dtype is exact.
EXACT = {
    "float32": 2**24, "float64": 2**53, "float16": 2**11, "bfloat16": 2**8,
    "int32": 2**31 - 1, "int64": 2**63 - 1,
}  # fmt: skip
# torch 2.13's names, else the earlier ones
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Case:
    """One collective at one size. `size` and `count` as nccl-tests has them: bytes of the larger of
    the buffers that go in and come out, and elements of one rank's share of the call."""

    size: int
    count: int
    call: Callable[[], object]
    output: Tensor
    expected: Callable[[], Tensor]

    def wrong(self) -> int:
        """Call once, and count the elements that are not what they must be."""
        self.call()
        return int((self.output != self.expected()).sum())


def make_case(collective: str, size: int, dtype: str, job: Runtime) -> Case:
    """Buffers of about `size` bytes: a whole number of elements for each rank, at least one."""
    kind = getattr(torch, dtype)
    shared = collective in ("all_gather", "reduce_scatter", "all_to_all")
    shares = job.world_size if shared else 1
    count = max(1, size // (kind.itemsize * shares))
    pattern = Pattern(kind, job)
    call, output, expected = _MAKERS[collective](count, pattern, job)
    return Case(count * shares * kind.itemsize, count, call, output, expected)


class Pattern:
    """Element i of rank r is (i + 3·r) mod m; m keeps the sum over the ranks exact."""

    def __init__(self, dtype: torch.dtype, job: Runtime) -> None:
        name = str(dtype).removeprefix("torch.")
        self.modulus = min(251, EXACT[name] // job.world_size)
        if self.modulus < 2:
            raise UsageError(
                f"--dtype {name} does not add {job.world_size} ranks' numbers without rounding, so "
                "nothing could be verified; use float32"
            )
        self.dtype, self.device, self.world_size = dtype, job.device, job.world_size

    def of(self, rank: int, count: int, begin: int = 0) -> Tensor:
        """Elements `begin` to `begin + count` of this rank's data."""
        index = torch.arange(begin, begin + count, device=self.device)
        return ((index + 3 * rank) % self.modulus).to(self.dtype)

    def summed(self, count: int, begin: int = 0) -> Tensor:
        """The sum over all ranks."""
        index = torch.arange(begin, begin + count, device=self.device)
        total = torch.zeros_like(index)
        for rank in range(self.world_size):
            total += (index + 3 * rank) % self.modulus
        return total.to(self.dtype)


Made = tuple[Callable[[], object], Tensor, Callable[[], Tensor]]


def _all_reduce(count: int, pattern: Pattern, job: Runtime) -> Made:
    buffer = pattern.of(job.rank, count)
    return lambda: dist.all_reduce(buffer), buffer, lambda: pattern.summed(count)


def _all_gather(count: int, pattern: Pattern, job: Runtime) -> Made:
    own = pattern.of(job.rank, count)
    gathered = own.new_zeros(count * job.world_size)

    def expected() -> Tensor:
        return torch.cat([pattern.of(rank, count) for rank in range(job.world_size)])

    return lambda: _all_gather_single(gathered, own), gathered, expected


def _reduce_scatter(count: int, pattern: Pattern, job: Runtime) -> Made:
    whole = pattern.of(job.rank, count * job.world_size)
    share = whole.new_zeros(count)
    return (
        lambda: _reduce_scatter_single(share, whole),
        share,
        lambda: pattern.summed(count, job.rank * count),
    )


def _all_to_all(count: int, pattern: Pattern, job: Runtime) -> Made:
    outgoing = pattern.of(job.rank, count * job.world_size)
    incoming = torch.zeros_like(outgoing)

    def expected() -> Tensor:
        begin = job.rank * count
        return torch.cat([pattern.of(rank, count, begin) for rank in range(job.world_size)])

    return lambda: dist.all_to_all_single(incoming, outgoing), incoming, expected


def _broadcast(count: int, pattern: Pattern, job: Runtime) -> Made:
    buffer = pattern.of(job.rank, count)
    return lambda: dist.broadcast(buffer, 0), buffer, lambda: pattern.of(0, count)


def _reduce(count: int, pattern: Pattern, job: Runtime) -> Made:
    """Only rank 0's buffer is defined afterwards, so the others show a copy of what is right."""
    buffer = pattern.of(job.rank, count)
    output = buffer if job.is_main else pattern.summed(count)
    return lambda: dist.reduce(buffer, 0), output, lambda: pattern.summed(count)


def _sendrecv(count: int, pattern: Pattern, job: Runtime) -> Made:
    """A ring, as in nccl-tests: every rank sends to the next and receives from the one before.

    gloo sends from host memory only, so on a GPU the copies there and back are part of the call.
    """
    to, source = (job.rank + 1) % job.world_size, (job.rank - 1) % job.world_size
    outgoing = pattern.of(job.rank, count)
    incoming = torch.zeros_like(outgoing)
    staged = job.backend == "gloo" and job.device.type == "cuda"
    host = torch.zeros_like(incoming, device="cpu") if staged else incoming

    def call() -> None:
        if job.world_size == 1:
            incoming.copy_(outgoing)
            return
        sent = outgoing.cpu() if staged else outgoing
        operations = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, host, source)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if staged:
            incoming.copy_(host)

    return call, incoming, lambda: pattern.of(source, count)


_MAKERS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_to_all": _all_to_all,
    "sendrecv": _sendrecv,
}
COLLECTIVES = tuple(_MAKERS)
