"""A polite request to stop: SIGUSR1, which sbatch --signal sends, or SIGTERM, which torchrun sends.

A handler must not save: it comes in the middle of a step, on one rank, perhaps within a collective.
It sets a flag; the ranks tell each other with the losses, and stop after the same step.
"""

import signal
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether a signal asked this process to stop; in force while its `with` block is."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
