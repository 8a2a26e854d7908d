"""How far a run is: its losses, its steps' seconds, and whether the ranks were asked to stop."""

import math
import time
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.run import Run
from distlab.runtime import Runtime

WARMUP_STEPS = 5  # not counted in the median step
RECENT = 20  # steps whose mean loss is told


class Progress:
    """The same on every rank. `losses` are means over the ranks, of the steps of this run."""

    def __init__(self, run: Run, args: Namespace, job: Runtime, first_step: int) -> None:
        self.run, self.args, self.job, self.first_step = run, args, job, first_step
        self.seconds: list[float] = []
        self.held_out: dict[int, float] = {}  # by the steps done
        # What the ranks told each other in each step: the sum of their losses, and how many were
        # asked to stop.
        self._told = torch.zeros(args.steps, 2, device=job.device)

    def steps(self) -> Iterator[int]:
        """The steps to do; the time from one on is taken until `share` is called."""
        for step in self.run.progress(range(self.first_step, self.args.steps), "training"):
            self._started = time.perf_counter()
            yield step

    def share(self, step: int, loss: Tensor, asked_to_stop: bool) -> bool:
        """Tell the other ranks; whether any rank was asked to stop, the same answer on all.

        The answer is that of the step before, which has come by now: asking a GPU for this step's
        would make the host wait for it, and the GPU afterwards for the host.
        """
        told = self._told[step]
        told[0], told[1] = loss, float(asked_to_stop)
        dist.all_reduce(told)
        stop = step > self.first_step and bool(self._told[step - 1, 1].item())
        self.seconds.append(time.perf_counter() - self._started)
        return stop

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
        return self.args.batch_size * self.args.seq_len / sorted(steady)[len(steady) // 2]
