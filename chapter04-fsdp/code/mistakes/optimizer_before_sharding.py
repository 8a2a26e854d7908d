"""The optimizer is made before the model is sharded: it trains parameters that nobody uses.

`fully_shard` replaces every parameter by a shard of it. An optimizer made before holds the old
ones: they get no gradient, so its step changes nothing, and it says nothing. The loss is what it
was.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/optimizer_before_sharding.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/optimizer_before_sharding.py --fix

You should see: weights that are equal before and after training. With --fix they change.
"""

from argparse import Namespace

import torch

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = mistake.network(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # the mistake: sharded afterwards
    mistake.shard(model)
    if args.fix:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = mistake.loss_of(model, job, 0).item()
    for step in range(args.steps):
        loss = mistake.loss_of(model, job, step)
        loss.backward()
        optimizer.step()
        model.zero_grad()
    after = mistake.loss_of(model, job, 0).item()
    run.print(f"sample: the first batch's loss {before:.4f} before, {after:.4f} after")
    run.check_below("the first batch's loss, to its loss before training", after / before, 0.999)


if __name__ == "__main__":
    script.exit(main)
