"""What the ranks of a job tell each other about a result: values, weights bit for bit, times."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from distlab.measure import Timing, compare
from distlab.runtime import Runtime

Value = TypeVar("Value")


def gathered(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's `value`, in the order of ranks, on every rank; each value is pickled."""
    values: list[Value | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values  # type: ignore[return-value]  # all are filled in


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in their order: equal where they are, bit for bit."""
    whole = hashlib.sha256()
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().flatten()
        whole.update(content.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def distinct(tensors: Iterable[torch.Tensor]) -> int:
    """How many different values the ranks hold, compared bit for bit: 1 where all are equal."""
    return len(set(gathered(digest(tensors))))


def slowest(timing: Timing) -> Timing:
    """Of every call, the seconds of the rank that took longest; the same on every rank.

    A collective is over when its last rank is, so this and not the own time is what it takes. All
    ranks must have timed equally many calls.
    """
    everyone = np.array(gathered(timing.samples))  # [ranks, calls]
    return Timing(tuple(everyone.max(axis=0).tolist()))


def in_turns(
    steps: Mapping[str, Callable[[], object]], warmup: int, repeats: int, job: Runtime
) -> dict[str, Timing]:
    """Each of `steps`, timed in turns: of each call the slowest rank's seconds."""
    timings = compare(steps, warmup, repeats, job.device, before=job.barrier)
    return {name: slowest(timing) for name, timing in timings.items()}
