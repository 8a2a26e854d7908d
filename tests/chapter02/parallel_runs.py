"""The parallelism scripts' own runs on spawned ranks, and what torchrun would tell a rank."""

import sys
from importlib import import_module
from types import SimpleNamespace

import torch

from distlab import script
from distlab.files import repo_root

CODE = repo_root() / "chapter02-gpu-hardware-parallelism" / "code"
SMOKE = ["--preset", "smoke", "--device", "cpu"]


def one_of(ranks):
    """What torchrun tells one of the ranks; the others are not there."""
    return {
        "RANK": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def run_scripts(job, names, change=lambda module: None):
    """The scripts' own runs on this rank: their checks, and predicted and measured numbers."""
    sys.path.insert(0, str(CODE))
    runs = []
    for name in names:
        module = import_module(name)
        change(module)
        torch.manual_seed(0)  # which the script before has changed
        args = module.parser(module.__doc__).parse_args(SMOKE)
        with script.run(args) as run:
            module.compare_with_one_process(run, args, job)
        comparisons = {key: (c["predicted"], c["measured"]) for key, c in run.comparisons.items()}
        runs.append(SimpleNamespace(checks=run.checks, comparisons=comparisons))
    return runs


def failed(run):
    return [check.name for check in run.checks if not check.ok]
