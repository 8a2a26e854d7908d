"""The flags of a training script, and what is refused before anything starts."""

import argparse
import shutil
from argparse import Namespace
from pathlib import Path

import torch

from distlab import data, runtime, script
from distlab.errors import UsageError
from distlab.files import refuse_unwritable_beside
from distlab.model import add_model_flags, config_from_args
from distlab.runtime import Runtime
from distlab.training.held_out import DTYPES, autocast


def add_training_flags(parser: script.Parser) -> None:
    """Those of the model, the data and the job too; a preset gives sizes and steps."""
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    learning = parser.add_argument_group("learning")
    learning.add_argument("--steps", type=script.positive_int, help="of the optimizer")
    learning.add_argument("--learning-rate", type=script.positive_float, metavar="LR")
    learning.add_argument(
        "--warmup", type=script.fraction, default=0.1, help="share of the steps (default 0.1)"
    )
    learning.add_argument("--weight-decay", type=script.non_negative_float, default=0.1)
    learning.add_argument(
        "--clip", type=script.positive_float, default=1.0, help="largest norm of the gradient"
    )
    learning.add_argument("--eval-every", type=script.positive_int, metavar="STEPS")
    learning.add_argument(
        "--eval-windows", type=script.positive_int, metavar="N", help="held-out sequences"
    )
    execution = parser.add_argument_group("execution")
    execution.add_argument("--dtype", choices=list(DTYPES), default="float32")
    execution.add_argument(
        "--accumulate", type=script.positive_int, default=1, metavar="N",
        help="micro-batches of a rank in each optimizer step",
    )  # fmt: skip
    execution.add_argument(
        "--prove", type=script.positive_int, metavar="N",
        help="afterwards repeat the first N steps on one process and compare the losses",
    )  # fmt: skip
    execution.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint-dir", metavar="DIR")
    files.add_argument("--checkpoint-every", type=script.positive_int, default=100, metavar="STEPS")
    files.add_argument("--keep", type=script.positive_int, default=3, help="newest checkpoints")
    files.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH",
        help="from the newest checkpoint of --checkpoint-dir that is whole, if any; or from PATH",
    )  # fmt: skip
    files.add_argument("--export", metavar="DIR", help="write a Hugging Face model folder")


def take_shape(args: Namespace, size: str, changes: dict[str, int]) -> None:
    """Make the model one of `size` with `changes`; the user's own flags win."""
    args.model = size
    for name, value in changes.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def refuse(args: Namespace) -> None:
    """Raise `UsageError` for what can be known to be wrong before the ranks meet."""
    config_from_args(args)
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler and there is none; install g++")
    if args.export:
        refuse_used_folder(Path(args.export))
    if args.checkpoint_dir and Path(args.checkpoint_dir).is_file():
        raise UsageError(f"--checkpoint-dir {args.checkpoint_dir} is a file; name a folder")
    refuse_resume(args)


def refuse_used_folder(folder: Path) -> None:
    """After an hour of training would be too late to hear of it."""
    if folder.is_file():
        raise UsageError(f"--export {folder} is a file; name a folder for the model")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--export {folder} is not empty; name a new folder, or remove it first")
    refuse_unwritable_beside("--export", folder)


def refuse_resume(args: Namespace) -> None:
    if args.resume == "none":
        used = args.checkpoint_dir and any(Path(args.checkpoint_dir).glob("step_*"))
        if used:
            raise UsageError(
                f"--resume none: {args.checkpoint_dir} holds the checkpoints of another run, which "
                "--resume auto would take up later; name a new --checkpoint-dir, or remove it"
            )
    elif args.resume != "auto" and not Path(args.resume).is_dir():
        raise UsageError(
            f"--resume {args.resume}: there is no such checkpoint; use auto, none, or a folder "
            "such as CHECKPOINT_DIR/step_00000100"
        )


def refuse_for(args: Namespace, job: Runtime) -> None:
    """Raise `UsageError` for what this job's ranks and devices cannot do."""
    refuse_batch(args, job.world_size)
    refuse_dtype(args.dtype, job.device)


def refuse_batch(args: Namespace, world_size: int) -> None:
    """The global batch is what decides the result, so nobody rounds it."""
    pieces = world_size * args.accumulate
    if args.batch_size % pieces:
        below = args.batch_size // pieces * pieces
        fitting = " or ".join(str(size) for size in (below, below + pieces) if size)
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {world_size} rank(s) x "
            f"--accumulate {args.accumulate}; use --batch-size {fitting}"
        )


def refuse_dtype(dtype: str, device: torch.device) -> None:
    """Try what a step does, on a few numbers: versions and processors differ in what they have."""
    if dtype == "float32":
        return
    weight = torch.ones(16, 16, device=device, requires_grad=True)
    try:
        with autocast(device, dtype):
            (weight @ weight).float().sum().backward()
    except RuntimeError as error:
        raise UsageError(
            f"--dtype {dtype} does not work on this {device.type} "
            f"({str(error).splitlines()[0]}); use --dtype float32"
        ) from error
