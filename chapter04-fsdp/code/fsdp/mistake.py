"""What every mistake shares: flags, a run, a small model and its data. The mistake is elsewhere."""

import os
import re
import runpy
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from distlab import runtime, script
from distlab.errors import RunError
from distlab.run import Run
from distlab.runtime import Runtime
from distlab.spawning import spawn

FOLDER = Path(__file__).parents[1] / "mistakes"
PRESETS = {"smoke": {"steps": 6}, "laptop": {"steps": 6}, "gpu": {"steps": 6}}
TIMEOUT_S = 15.0  # so long a rank waits for another: a hang ends by itself
LIMIT_S = 240.0  # of a rehearsal without hangs
WIDTH, CLASSES, BLOCKS, BATCH_SIZE = 64, 8, 6, 8
Train = Callable[[Run, Namespace, Runtime], None]


def main(doc: str | None, train: Train, argv: list[str] | None) -> int:
    """A mistake's run: `train` on every rank, with the mistake or, with --fix, cured."""
    args = parser(doc).parse_args(argv)
    with (
        script.run(args) as record,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        record.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        train(record, args, job)
    return record.status


def parser(doc: str | None) -> script.Parser:
    made = script.Parser(doc, PRESETS)
    runtime.add_runtime_flags(made)
    made.set_defaults(timeout=TIMEOUT_S)
    made.add_argument("--fix", action="store_true", help="run the cured version")
    made.add_argument("--steps", type=script.positive_int)
    return made


def network(job: Runtime) -> nn.Sequential:
    """Blocks of equal size and a classifier, the same on every rank."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES)).to(job.device)


def shard(model: nn.Sequential, every_block: bool = True) -> nn.Sequential:
    """`fully_shard` on each block and on what they leave; or on the whole alone."""
    for block in list(model)[:-1] if every_block else []:
        fully_shard(block)
    fully_shard(model)
    return model


def loss_of(model: nn.Module, job: Runtime, step: int, rank: int | None = None) -> Tensor:
    """The mean loss of a rank's batch of a step; of this rank's if `rank` is None."""
    own = job.rank if rank is None else rank
    draw = torch.Generator().manual_seed(1000 * step + own)
    inputs = torch.randn(BATCH_SIZE, WIDTH, generator=draw)
    targets = inputs[:, :CLASSES].argmax(dim=1)
    return cross_entropy(model(inputs.to(job.device)), targets.to(job.device))


@dataclass(frozen=True)
class Told:
    """What a rank said of its run: the checks that failed, or the error that ended it."""

    failed: tuple[str, ...]
    error: str = ""

    @property
    def silent(self) -> bool:
        return not self.failed and not self.error


def rehearse(names: Sequence[str], fix: bool, timeout_s: float) -> dict[str, list[Told]]:
    """Run mistakes, one after the other, on two forked ranks in place of torchrun's; what each rank
    told. A collective waits `timeout_s` at most."""
    argv = ["--preset", "smoke", *(["--fix"] if fix else [])]
    try:
        by_rank = spawn(_run_all, 2, names, argv, timeout_s, timeout_s=timeout_s + LIMIT_S)
    except RunError as error:  # gloo ends a process that gets another size than it expects
        return dict.fromkeys(names, [Told((), str(error).splitlines()[0])])
    return {name: [told[name] for told in by_rank] for name in names}


def _run_all(job: Runtime, names: Sequence[str], argv: list[str], timeout_s: float) -> Any:
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    os.environ["LAB_RECORD_DIR"] = ""  # the table is the record
    return {name: _run(job, name, argv) for name in names}


def _run(job: Runtime, name: str, argv: list[str]) -> Told:
    own = runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name)
    args = parser(own["__doc__"]).parse_args(argv)
    with script.run(args) as record:
        try:
            own["train"](record, args, job)
        except RuntimeError as error:
            return Told((), re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0]))
    return Told(tuple(f"{one.name}: {one.detail}" for one in record.checks if not one.ok))
