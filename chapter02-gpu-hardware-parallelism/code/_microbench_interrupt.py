"""Ctrl-C as a request: the ranks of a job agree to stop, instead of each dying where it is."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from distlab.runtime import Runtime

SAME_PRESS_S = 1.0  # a terminal and torchrun each send a SIGINT for one Ctrl-C


class Interrupt:
    """Within the block, the first Ctrl-C only sets `requested`; one that comes later ends at once.

    A rank that died in the middle of a collective would leave the others with an error instead of
    their results.
    """

    def __enter__(self) -> Self:
        self.requested = False
        self._first = 0.0
        self._previous: Any = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def agreed(self, job: Runtime) -> bool:
        """Whether any rank was asked to stop; the same on all of them, so all must call it."""
        flag = torch.tensor(int(self.requested), device=job.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._first > SAME_PRESS_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now
