"""Gradients are reduced after every micro-batch, where once, after the last, would do.

A step adds up the gradients of several micro-batches. Their sum over micro-batches and over ranks
can be taken in either order: nothing is wrong but the bytes, which are as many times more as there
are micro-batches. (The cure costs memory: until the last one each rank holds whole gradients.)

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/reduction_every_micro_batch.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/reduction_every_micro_batch.py --fix

You should see: a reduction of each unit in each micro-batch. With --fix one in each step.
"""

from argparse import Namespace
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake

MICRO_BATCHES = 4


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = mistake.shard(mistake.network(job))
    assert isinstance(model, FSDPModule)
    with Reductions() as reductions:
        for micro_batch in range(MICRO_BATCHES):
            if args.fix:  # the mistake: without it each backward pass reduces
                model.set_requires_gradient_sync(micro_batch == MICRO_BATCHES - 1)
            (mistake.loss_of(model, job, micro_batch) / MICRO_BATCHES).backward()
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    run.check_equal(f"reductions of {units} units in a step", reductions.count, units)


class Reductions(TorchDispatchMode):
    """Counts the reduce-scatters."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    script.exit(main)
