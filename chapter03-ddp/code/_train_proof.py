"""`train_ddp.py --prove N`: what N steps of one process with the same global batches give."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from _train_progress import Progress

from distlab.run import Run
from distlab.runtime import Runtime

TOLERANCE = 1e-5  # nats: float32 sums in another order, carried through that many steps


def prove(
    run: Run, args: Namespace, job: Runtime, progress: Progress, new_trainer: Callable
) -> None:
    """Compare the first losses of this run with those of one process, which rank 0 is now.

    `new_trainer` makes a trainer, given a job and its process group. Every rank must call this.
    """
    if progress.first_step > 0:
        run.print("proof: left out, since this run was resumed and has no first steps")
        return
    steps = min(args.prove, args.steps)
    alone = dist.new_group([0])
    if job.is_main:
        torch.manual_seed(args.seed)  # as the job began
        with new_trainer(job=replace(job, world_size=1), group=alone) as trainer:
            losses = [trainer.step(step).item() for step in range(steps)]
        worst = max(abs(a - b) for a, b in zip(losses, progress.losses(), strict=False))
        run.check_below("first losses differ from one process's by", worst, TOLERANCE, "nats")
    job.barrier()
