"""A checkpoint holds the weights and not the optimizer: training goes on, and is another one.

Adam divides by a running mean of squared gradients. After a resume without it the means begin at
zero, with the corrections of step 1 or, worse, of no step: the first updates are far larger than
those that they replace. Nothing fails; the loss takes a jump, and the run is not the run that was
interrupted.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/checkpoint_without_optimizer.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/checkpoint_without_optimizer.py --fix

You should see: losses after the resume that differ from those of a run without interruption. With
--fix they are equal bit for bit.
"""

import copy
from argparse import Namespace

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model, optimizer = begin(job)
    advance(model, optimizer, job, range(args.steps))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    through = advance(model, optimizer, job, range(args.steps, 2 * args.steps))
    model, optimizer = begin(job)
    if not args.fix:  # the mistake: the optimizer's state was not saved
        state = get_state_dict(model, optimizer)[1]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    resumed = advance(model, optimizer, job, range(args.steps, 2 * args.steps))
    run.check_close("losses after the resume, to those without one", resumed, through, 0.0)


def begin(job: Runtime) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mistake.shard(mistake.network(job))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, job: Runtime, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        loss = mistake.loss_of(model, job, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    script.exit(main)
