"""Replicas with equal weights and different buffers: they are not the same model either.

Batch normalisation keeps a running mean and variance of what it has seen. They are no parameters,
have no gradients, and no all-reduce averages them. DDP copies rank 0's to all ranks before each
forward pass; with broadcast_buffers=False, said to save time, each rank keeps those of its own
data. In training nothing shows it. In evaluation every rank gives another answer.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/unsynced_buffers.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/unsynced_buffers.py --fix

You should see: equal weights, and different logits for the same example in evaluation. With --fix
the ranks agree.
"""

from argparse import Namespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp import fault
from distlab import ranks, script
from distlab.run import Run
from distlab.runtime import Runtime


def main(argv: list[str] | None = None) -> int:
    return fault.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    network = nn.Sequential(nn.BatchNorm1d(fault.FEATURES), fault.network()).to(job.device)
    options: dict[str, Any] = {} if args.fix else {"broadcast_buffers": False}
    model = DDP(network, **options)  # the mistake: each rank keeps statistics of its own
    optimizer = fault.sgd(model.parameters())
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device)
        loss = cross_entropy(model(inputs + job.rank), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.print(f"sample: step {step}, loss {loss:.3f}")
    run.check_equal("all ranks hold the same weights", ranks.distinct(model.parameters()), 1)
    with torch.no_grad():  # through DDP: rank 0's statistics come before a forward pass, not after
        logits = model.eval()(torch.ones(1, fault.FEATURES, device=job.device))
    run.check_equal("all ranks give the same logits", ranks.distinct([logits]), 1)


if __name__ == "__main__":
    script.exit(main)
