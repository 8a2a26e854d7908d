"""Every rank on the first device: the others stand idle, and one does the work of all.

The line that chooses the device says 0 where LOCAL_RANK belongs. With NCCL two ranks on one GPU are
an error (`Duplicate GPU detected`); over gloo, or with one process that only uses the GPU, nothing
complains: the memory of GPU 0 runs out first, and the job is as slow as one device.

Without two GPUs the same mistake is made with the processor's cores: each rank pins itself to core
0, as launch scripts do to keep ranks from wandering, and both share it.

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/same_device.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/faults/same_device.py --fix

You should see: the device of each rank, and a check that fails, since it is the same one (or NCCL's
error). With --fix each rank has its own.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp import fault
from distlab import ranks, script
from distlab.errors import Skipped
from distlab.run import Run
from distlab.runtime import Runtime


def main(argv: list[str] | None = None) -> int:
    args = fault.parser(__doc__).parse_args(argv)
    if args.device == "auto" and torch.cuda.device_count() < 2:
        args.device = "cpu"
    return fault.run(args, train)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    is_gpu = job.device.type == "cuda"
    devices: Sequence[Any] = range(torch.cuda.device_count()) if is_gpu else cores()
    if len(devices) < job.local_world_size:
        raise Skipped(f"{job.local_world_size} ranks need as many GPUs or cores; here are fewer")
    choose: Any = torch.cuda.set_device if is_gpu else partial(os.sched_setaffinity, 0)
    choose(devices[job.local_rank if args.fix else 0])  # the mistake: LOCAL_RANK is forgotten
    own = torch.cuda.current_device() if is_gpu else sorted(os.sched_getaffinity(0))
    used = ranks.gathered((os.uname().nodename, str(own)))
    run.print(f"sample: devices by rank {[device for _, device in used]}")

    model = DDP(fault.network().to(job.device.type))
    optimizer = fault.sgd(model.parameters())
    for step in range(1, args.steps + 1):
        inputs, targets = fault.examples(job.rank, step, job.device.type)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.check_equal("each rank has a device of its own", len(set(used)), job.world_size)


def cores() -> list[set[int]]:
    """The cores that a process may be pinned to, one by one."""
    if not hasattr(os, "sched_setaffinity"):
        raise Skipped("this system pins no process to a core, and there are no two GPUs")
    return [{core} for core in sorted(os.sched_getaffinity(0))]


if __name__ == "__main__":
    script.exit(main)
