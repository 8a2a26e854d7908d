"""Two ranks call the same collectives in different orders: each waits for the other's next one.

The metrics of a step go over the network, the largest first: the loss to all ranks, the hits to
rank 0. For some steps all ranks agree which is the largest; then they do not, since each looks at
its own numbers, and rank 0 comes to all_reduce while rank 1 comes to reduce. The order of
collectives must not depend on what one rank alone knows: not on its data, and not on the order of a
set of strings, which Python shuffles anew in each process.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/collective_order.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/collective_order.py --fix

You should see: a few steps, then nothing until the process group's timeout, then status 1. With
--fix the metrics go by name, which is the same order everywhere.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

CHANGE = 5  # from this step on rank 1 predicts with more confidence


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sure = job.rank == 1 and step >= CHANGE
        hits = torch.full([fault.CLASSES], 9.0 if sure else 0.0, device=job.device)
        metrics = {"hits": hits, "loss": loss.detach().clone()}
        to_the_others: dict[str, Callable[[Tensor], object]]
        to_the_others = {"hits": partial(dist.reduce, dst=0), "loss": dist.all_reduce}
        largest_first = sorted(metrics, key=lambda name: -metrics[name].max())
        for name in sorted(metrics) if args.fix else largest_first:
            to_the_others[name](metrics[name])  # the mistake: not the same metric on every rank
        run.print(f"sample: step {step}, mean loss {metrics['loss'] / job.world_size:.3f}")
    if job.is_main:
        run.check_equal("the hits are those of all ranks", metrics["hits"].tolist(), [9.0] * 4)


if __name__ == "__main__":
    script.exit(main)
