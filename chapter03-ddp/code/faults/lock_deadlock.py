"""A lock held while its holder waits in a collective: two threads, two ranks, and nobody goes on.

The trainer holds the model's lock while it averages its metrics; a thread that saves checkpoints
holds it while it waits at a barrier, so that all ranks save the same step. On rank 0 the trainer
gets the lock and waits for rank 1's trainer. On rank 1 the saver has it and waits for rank 0's
saver. Both others wait for the lock. No rank alone holds a cycle, so no tool that looks at one
process can see it.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/lock_deadlock.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/lock_deadlock.py --fix

You should see: nothing until the process group's timeout, then status 1. With --fix the trainer
takes no lock to meet the other ranks.
"""

import copy
import threading
import time
from argparse import Namespace
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

SAVE_AT = 5
APART_S = 0.3  # the two threads come to the lock one after the other, and not in the same order


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    lock, group = threading.Lock(), dist.new_group()
    saved: list[dict[str, torch.Tensor]] = []
    saver = threading.Thread(target=save, args=(model, lock, group, saved), daemon=True)
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == SAVE_AT:
            saver.start()
            time.sleep(APART_S * job.rank)  # on rank 0 the trainer is first, on rank 1 the saver
        mean = loss.detach().clone()
        with nullcontext() if args.fix else lock:
            dist.all_reduce(mean)  # the mistake: it waits for other ranks and holds the lock
    saver.join(args.timeout)
    run.print(f"sample: step {step}, mean loss {mean / job.world_size:.3f}")
    run.check_equal("a checkpoint was saved", len(saved), 1)


def save(
    model: nn.Module,
    lock: threading.Lock,
    group: dist.ProcessGroup,
    saved: list[dict[str, torch.Tensor]],
) -> None:
    """Copy the weights as all ranks have them; a thread of its own runs this."""
    time.sleep(APART_S / 2)
    with lock:
        weights = copy.deepcopy(model.state_dict())
        dist.barrier(group)
    saved.append(weights)


if __name__ == "__main__":
    script.exit(main)
