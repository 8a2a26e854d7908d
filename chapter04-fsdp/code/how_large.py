"""The largest model that a device of a given size trains: predicted, then found.

Every rank gets a memory of --memory-mb that the system enforces (distlab.training.memory). For each
way to spread the state the largest number of layers is predicted by a walk through the step
(fsdp/capacity.py), and then found by bisection: each probe starts ranks that train two steps, and
either they do, or one of them ends with the line that says what held the bytes.

Run:
    python chapter04-fsdp/code/how_large.py
    python chapter04-fsdp/code/how_large.py --ranks 2 --memory-mb 96

You should see: a table of the largest models, predicted and found, within 10 % of each other, and
what a rank said that had one layer too many.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import script
from distlab.errors import RunError, UsageError
from distlab.model import Llama, ModelConfig, num_parameters
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.spawning import spawn
from distlab.training.memory import MB, bytes_of, device_memory
from fsdp.capacity import MODES, Mode, largest, peak

PRESETS: dict[str, dict[str, object]] = {
    "smoke": {"ranks": 2, "memory_mb": 24.0, "hidden_size": 64, "batch_size": 1, "seq_len": 64},
    "laptop": {"ranks": 4, "memory_mb": 192.0, "hidden_size": 256, "batch_size": 2, "seq_len": 128},
    "gpu": {"ranks": 2, "memory_mb": 4000.0, "hidden_size": 1024, "batch_size": 4, "seq_len": 512},
}  # fmt: skip
VOCABULARY = 512
STEPS = 2  # the second has the optimizer's state from its beginning
WORST = 10.0  # per cent


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run:
        rows, said = [], ""
        for mode in run.progress(MODES, "modes"):
            row, said = report_mode(run, args, mode)
            rows.append(row)
        report(run, args, rows, said)
    return run.status
