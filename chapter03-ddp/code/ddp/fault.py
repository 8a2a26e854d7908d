"""What every fault shares: its flags, its run, a tiny model, its data. The mistake is elsewhere."""

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distlab import runtime, script
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {"smoke": {"steps": 20}, "laptop": {"steps": 20}, "gpu": {"steps": 20}}
TIMEOUT_S = 15.0  # so long a rank waits for another: a hang ends by itself
BATCH_SIZE = 8
FEATURES, CLASSES = 16, 4
Train = Callable[[Run, Namespace, Runtime], None]


def main(doc: str | None, train: Train, argv: list[str] | None) -> int:
    """A fault's run: `train` on every rank of the job, with the mistake or, with --fix, cured."""
    return run(parser(doc).parse_args(argv), train)


def run(args: Namespace, train: Train) -> int:
    with (
        script.run(args) as record,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        record.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
        train(record, args, job)
    return record.status


def parser(doc: str | None, **presets: dict[str, int]) -> script.Parser:
    """The flags of every fault; a keyword replaces that preset's values."""
    made = script.Parser(doc, {**PRESETS, **presets})
    runtime.add_runtime_flags(made)
    made.set_defaults(timeout=TIMEOUT_S)
    made.add_argument("--fix", action="store_true", help="run the cured version")
    made.add_argument("--steps", type=script.positive_int)
    return made


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def replica(job: Runtime) -> DDP:
    """The tiny model on this rank's device, wrapped in DDP."""
    return DDP(network().to(job.device))


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


def examples(
    rank: int, step: int, device: torch.device | str = "cpu", count: int = BATCH_SIZE
) -> tuple[Tensor, Tensor]:
    """A rank's batch of a step: features [batch, 16] and the classes [batch] that they tell."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(count, FEATURES, generator=draw)
    return inputs.to(device), inputs[:, :CLASSES].argmax(dim=1).to(device)
