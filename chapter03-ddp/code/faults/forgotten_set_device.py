"""No rank chooses its device: "cuda" means the current one, and that is number 0 for everybody.

`model.to("cuda")` and `torch.ones(3, device="cuda")` go to the current device. torchrun starts a
process for each GPU, but which GPU is whose it does not say; a script calls
torch.cuda.set_device(LOCAL_RANK) before anything touches CUDA, or gives each rank one visible GPU.

Run, on a machine with two GPUs:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/forgotten_set_device.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/forgotten_set_device.py --fix

You should see: NCCL's `Duplicate GPU detected`, status 1. With --fix each rank trains on its own
GPU. Where there are no two GPUs: SKIPPED.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp import fault
from distlab import ranks, script
from distlab.errors import Skipped
from distlab.run import Run


def main(argv: list[str] | None = None) -> int:
    args = fault.parser(__doc__).parse_args(argv)
    if torch.cuda.device_count() < 2:
        raise Skipped("this needs two GPUs, so that there is a choice to forget")
    with script.run(args) as run, nccl(args.timeout):
        train(run, args)
    return run.status


@contextmanager
def nccl(timeout_s: float) -> Iterator[None]:
    """A group as most scripts make it; distlab's own would choose the device, too."""
    dist.init_process_group("nccl", timeout=timedelta(seconds=timeout_s))
    yield
    dist.destroy_process_group()


def train(run: Run, args: Namespace) -> None:
    if args.fix:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    network = fault.network().to("cuda")
    model = DDP(network)  # the mistake: before this line, set_device was forgotten
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(dist.get_rank(), step, "cuda")
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = ranks.gathered(torch.cuda.current_device())
    run.check_equal("each rank has a GPU of its own", len(set(used)), dist.get_world_size())


if __name__ == "__main__":
    script.exit(main)
