"""One rank has one batch more than the other: its last backward pass waits for nobody.

25 examples are dealt out like cards: 13 to rank 0, 12 to rank 1. In batches of 4 that is four for
rank 0, the last of a single example, and three for rank 1, which leaves the loop and goes on to the
evaluation. A DistributedSampler gives every rank as many, by repeating some examples or by dropping
some; `Join` lets a rank that is done answer the others' collectives.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/uneven_last_batch.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/uneven_last_batch.py --fix

You should see: nothing until the process group's timeout, then status 1. With --fix rank 1 joins,
and all 25 examples are trained on.
"""

from argparse import Namespace
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ddp import fault
from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime

EXAMPLES = 25


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = fault.replica(job)
    optimizer = fault.sgd(model.parameters())
    dealt = TensorDataset(*(t[job.rank :: job.world_size] for t in fault.examples(0, 0, "cpu", 25)))
    trained = torch.zeros((), device=job.device)
    with Join([model]) if args.fix else nullcontext():
        for inputs, targets in DataLoader(dealt, batch_size=4):  # the mistake: not as many for all
            loss = cross_entropy(model(inputs.to(job.device)), targets.to(job.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained += len(inputs)
    dist.all_gather(every := [torch.empty_like(trained) for _ in range(job.world_size)], trained)
    run.print(f"sample: loss {loss:.3f}")
    run.check_equal("every example was trained on", int(sum(every)), EXAMPLES)


if __name__ == "__main__":
    script.exit(main)
