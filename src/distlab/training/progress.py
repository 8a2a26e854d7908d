"""How far a run is: its losses, its steps' seconds, its learning rate, and the request to stop.

Somebody asks a run to stop by SIGUSR1, which sbatch --signal sends, or SIGTERM, which torchrun
sends. A handler must not save: it comes in the middle of a step, on one rank, perhaps within a
collective. It sets a flag; the ranks tell each other with the losses, and stop after the same step.
"""

import math
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.errors import RunError
from distlab.run import Run
from distlab.runtime import Runtime

WARMUP_STEPS = 5  # not counted in the median step
RECENT = 20  # steps whose mean loss is told
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Progress:
    """The same on every rank. `losses` are means over the ranks, of the steps of this run.

    The run goes from `first_step` to `steps`; each step is of `tokens_per_step`, on all ranks.
    """

    def __init__(
        self, run: Run, job: Runtime, steps: int, tokens_per_step: int, first_step: int = 0
    ) -> None:
        self.run, self.job, self.num_steps, self.first_step = run, job, steps, first_step
        self.tokens_per_step = tokens_per_step
        self.seconds: list[float] = []
        self.held_out: dict[int, float] = {}  # by the steps done
        # What the ranks told each other in each step: the sum of their losses, and how many were
        # asked to stop.
        self._told = torch.zeros(steps, 2, device=job.device)

    def steps(self) -> Iterator[int]:
        """The steps to do; the time from one on is taken until `share` is called."""
        for step in self.run.progress(range(self.first_step, self.num_steps), "training"):
            self._started = time.perf_counter()
            yield step

    def share(self, step: int, loss: Tensor, asked_to_stop: bool) -> bool:
        """Tell the other ranks; whether any rank was asked to stop, the same answer on all.

        Raises `RunError`, on all ranks, when the loss is no number.

        The answer is that of the step before, which has come by now: asking a GPU for this step's
        would make the host wait for it, and the GPU afterwards for the host.
        """
        told = self._told[step]
        told[0], told[1] = loss, float(asked_to_stop)
        dist.all_reduce(told)
        stop = step > self.first_step and self._was_told(step - 1)
        self.seconds.append(time.perf_counter() - self._started)
        return stop

    def _was_told(self, step: int) -> bool:
        """Whether a rank was asked to stop in that step.

        A loss that is no number never becomes one again, and every checkpoint from there on would
        push out one that is good.
        """
        loss, asked = self._told[step].tolist()
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of step {step + 1} is {loss:g}, and stays so; use a lower "
                "--learning-rate, a longer --warmup or a smaller --clip, and --resume a checkpoint "
                "from well before it"
            )
        return bool(asked)

    def tell(self, done: int, held_out: float) -> None:
        """Print where the run is, after `done` steps."""
        self.held_out[done] = held_out
        recent = self.losses()[-RECENT:] or [math.nan]
        self.run.print(
            f"step {done}: loss {sum(recent) / len(recent):.3f} nats, held-out {held_out:.3f} nats"
        )

    @property
    def last_held_out(self) -> float:
        return self.held_out[max(self.held_out)]

    def losses(self) -> list[float]:
        """The mean loss of each step so far."""
        done = slice(self.first_step, self.first_step + len(self.seconds))
        return (self._told[done, 0] / self.job.world_size).tolist()

    def tokens_per_second(self) -> float | None:
        """Of all ranks together, from the median step; None where no step was left to do."""
        if not self.seconds:
            return None
        steady = self.seconds[WARMUP_STEPS:] or self.seconds
        return self.tokens_per_step / sorted(steady)[len(steady) // 2]


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: a straight warm-up to 1, then a cosine towards 0.

    `warmup` is the share of the steps that warm up. The factor is a function of the step alone, so
    that a resumed run needs no scheduler's state.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


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
