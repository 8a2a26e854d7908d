"""The parallelism scripts' own runs on spawned ranks, and what torchrun would tell a rank."""

from types import SimpleNamespace

import torch

from distlab import script
from parallelism.problem import parser

SMOKE = ["--preset", "smoke", "--device", "cpu"]


def one_of(ranks):
    """What torchrun tells one of the ranks; the others are not there."""
    return {
        "RANK": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def run_scripts(job, comparisons, change=lambda: None):
    """What the scripts compare on this rank: their checks, and predicted and measured numbers."""
    change()
    runs = []
    for compare_with_one_process in comparisons:
        torch.manual_seed(0)  # which the script before has changed
        args = parser("").parse_args(SMOKE)
        with script.run(args) as run:
            compare_with_one_process(run, args, job)
        numbers = {key: (c["predicted"], c["measured"]) for key, c in run.comparisons.items()}
        runs.append(SimpleNamespace(checks=run.checks, comparisons=numbers))
    return runs


def failed(run):
    return [check.name for check in run.checks if not check.ok]
