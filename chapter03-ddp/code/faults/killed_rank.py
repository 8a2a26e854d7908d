"""A rank is killed from outside, as when memory runs out: no exception, no last word.

Rank 1 hoards memory until the kernel's out-of-memory killer ends it by SIGKILL, which no program
can catch. Its peers find their connection closed, and their error blames a collective that is in
order. torchrun sees the signal, and ends the rest.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/killed_rank.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/killed_rank.py --fix

You should see: rank 0 loses the others at its backward pass, status 1. With --fix nobody hoards.
"""

import os
import subprocess
from argparse import Namespace

from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime

FATAL_STEP = 6


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    killer = ["sh", "-c", f"sleep 1; kill -9 {os.getpid()}"]  # stands for the kernel's
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        if job.rank == 1 and step == FATAL_STEP and not args.fix:
            subprocess.run(killer, timeout=args.timeout)  # the mistake: it hoards, and is killed
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.print(f"sample: step {step}, loss {loss:.3f}")
    run.check_equal("all ranks hold the same weights", ranks.distinct(model.parameters()), 1)


if __name__ == "__main__":
    script.exit(main)
