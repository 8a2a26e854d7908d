"""Only the root is wrapped: one unit holds the whole model, which is gathered at once.

`fully_shard(model)` alone trains rightly, and each rank stores its share. But the unit of gathering
is what was wrapped: from the first layer's forward to the last one's backward every rank holds all
parameters, and while they are gathered twice of them.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/only_root_wrapped.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/only_root_wrapped.py --fix

You should see: twice the model's bytes gathered at the peak. With --fix, where each block is
a unit, three blocks' and the classifier's.
"""

from argparse import Namespace

import torch

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake
from fsdp.memory_timeline import MemoryTimeline, gather_buffers


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = mistake.network(job)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    mistake.shard(model, every_block=args.fix)  # the mistake: without --fix the root alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step() -> None:
        mistake.loss_of(model, job, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    buffers = gather_buffers(model, step)
    with MemoryTimeline(model, optimizer, {"gathered": buffers}) as timeline:
        step()
    peak = max(timeline.by_kind()["gathered"])
    run.check_below("gathered at once, to the whole model", peak / whole, 0.75)


if __name__ == "__main__":
    script.exit(main)
