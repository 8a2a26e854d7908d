"""Rank 0 alone asks for the model's whole state: a collective to which the others do not come.

With plain DDP rank 0 may save its replica by itself. A sharded model has no whole state anywhere:
each tensor must be gathered from all ranks. So `full_state_dict` is a collective, though it looks
like a question, and under `if rank == 0` it waits for ranks that have gone on.

Run:
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/state_dict_on_one_rank.py
    torchrun --nproc_per_node=2 chapter04-fsdp/code/mistakes/state_dict_on_one_rank.py --fix

You should see: nothing, until the process group's timeout; then an error, status 1. With --fix
every rank asks, and rank 0 alone gets the state.
"""

from argparse import Namespace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from distlab import script
from distlab.run import Run
from distlab.runtime import Runtime
from fsdp import mistake


def main(argv: list[str] | None = None) -> int:
    return mistake.main(__doc__, train, argv)


def train(run: Run, args: Namespace, job: Runtime) -> None:
    model = mistake.shard(mistake.network(job))
    mistake.loss_of(model, job, 0).backward()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=job.device.type == "cuda")
    state: dict[str, Any] = {}
    if job.is_main or args.fix:
        state = get_model_state_dict(model, options=whole)  # the mistake: rank 0 alone comes here
    dist.barrier()
    elements = sum(tensor.numel() for tensor in state.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    run.check_equal(
        "elements of the state on rank 0", elements if job.is_main else parameters, parameters
    )


if __name__ == "__main__":
    script.exit(main)
