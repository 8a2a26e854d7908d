"""Stop a run, resume it, and get the same run: bit for bit, from a checkpoint that survives.

The house model is trained under DDP for N steps, undisturbed. Then the same again, but stopped
after some steps: the state is saved, everything is thrown away, and a run that began differently
takes the state up. Losses, parameters, moments, schedule, loss scale and random states must be the
same bits at the end. Random numbers matter here: some tokens of each input are replaced by random
ones, how many is drawn by Python, where by NumPy, by what by torch, and each rank draws its own.

Then each part of the state is left out in turn, which no error tells: how far are the losses off?
At last the disk is made full, and checkpoints are cut short and changed, and a step waits for a
checkpoint that is written before its eyes (synchronous), or behind its back (asynchronous).

Run:
    torchrun --nproc_per_node=2 chapter03-ddp/code/checkpoint_resume.py
    torchrun --nproc_per_node=2 chapter03-ddp/code/checkpoint_resume.py --stop-after 3
    python chapter03-ddp/code/checkpoint_resume.py

You should see: a difference of exactly 0 with the whole state and more than 0 without any one part;
each damaged checkpoint named, and the one before it used; 12 bytes a parameter; and a step that
waits for the copy of the state only, where the checkpoint is written in the background.
"""

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp.checkpoints import Checkpoints
from ddp.resuming import (
    Trainee,
    damage_one_after_another,
    differing,
    full_disk,
    report_bytes,
    report_stall,
)  # fmt: skip
from ddp.training_state import load_agreed
from distlab import data, runtime, script
from distlab.errors import RunError, UsageError
from distlab.model import add_model_flags, config_from_args
from distlab.run import Run
from distlab.runtime import Runtime

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 32, "batch_size": 8, "steps": 8},
    "laptop": {"model": "laptop", "corpus_mb": 2.0, "seq_len": 64, "batch_size": 8, "steps": 16},
    "gpu": {
        "model": "gpu", "layers": 2,  # 0.1 B parameters: 1.3 GB a checkpoint
        "corpus_mb": 12.0, "seq_len": 1024, "batch_size": 8, "steps": 20,
    },
}  # fmt: skip
REST = ("optimizer", "scheduler", "scaler", "loader", "random")
LEFT_OUT = {
    "nothing": (),
    "the optimizer's moments": ("optimizer",),
    "the learning-rate schedule": ("scheduler",),
    "the loader's position": ("loader",),
    "the random states": ("random",),
    "all but the weights": REST,
}
SETTLED = "nothing but the order of DDP's buckets"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
        shared_folder(args, job) as folder,
    ):
        sum_in_one_order(job)
        tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
        demonstrate(run, args, job, tokens, folder)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    parser.add_argument("--steps", type=script.positive_int, help="of the undisturbed run")
    parser.add_argument(
        "--stop-after", type=script.positive_int, metavar="STEP", help="default: the middle"
    )
    parser.add_argument("--learning-rate", type=script.positive_float, default=3e-3, metavar="LR")
    parser.add_argument(
        "--folder", metavar="DIR", help="for the checkpoints, shared by all ranks (default: a new)"
    )
    args = parser.parse_args(argv)
    if args.stop_after is None:
        args.stop_after = args.steps // 2
    if not 1 <= args.stop_after <= args.steps - 2:
        raise UsageError(
            f"--stop-after {args.stop_after} of --steps {args.steps} leaves no two steps to "
            f"compare; use 1 to {args.steps - 2}, or more --steps"
        )
    return args


def demonstrate(run: Run, args: Namespace, job: Runtime, tokens: data.Tokens, folder: Path) -> None:
    run.print(
        f"job: {job.world_size} rank(s), stopped after {args.stop_after} of {args.steps} steps"
    )
    undisturbed = Trainee(args, job, tokens, args.seed)
    losses = undisturbed.train(args.steps)
    before = losses[: args.stop_after]
    said: list[str] = []
    store = Checkpoints(folder, report=said.append)
    stop(run, store, said, Trainee(args, job, tokens, args.seed), before)

    differences = {}
    for name in [*LEFT_OUT, SETTLED]:
        # What is left out is as at the beginning; of the whole state nothing is, by another seed.
        parts = LEFT_OUT.get(name, ())
        resumed = Trainee(args, job, tokens, args.seed if parts else args.seed + 1000)
        loaded = load_agreed(store, job)
        if loaded is None:
            raise RunError(f"the checkpoint in {folder} is gone")
        resumed.restore(loaded.state, left_out=parts, settle=name != SETTLED)
        off = (resumed.train(args.steps - loaded.step) - losses[loaded.step :]).abs()
        differences[name] = off.tolist()
        if name == "nothing":
            check_same_run(run, undisturbed, resumed, differences[name])
    must_show = [name for name, parts in LEFT_OUT.items() if parts]
    report_left_out(run, differences, must_show, args.stop_after)

    state = undisturbed.state()
    if job.is_main:
        report_bytes(run, store.path(args.stop_after), undisturbed.model)
        damage_one_after_another(run, folder / "damaged", state["model"])
    job.barrier()
    report_stall(run, args, undisturbed, folder)
    store.close()


def sum_in_one_order(job: Runtime) -> None:
    """On a GPU, let no kernel add in the order in which threads happen to come."""
    if job.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def stop(
    run: Run, store: Checkpoints, said: list[str], trainee: Trainee, expected: torch.Tensor
) -> None:
    """Train up to the stop, and save: in vain while the disk is full, and then well."""
    losses = trainee.train(len(expected))
    run.check_equal(
        "a run begun again is the same up to the stop", losses.tolist(), expected.tolist()
    )
    state = trainee.state()
    if trainee.job.is_main:
        with full_disk():
            store.save(len(expected), state)
            store.wait()
        run.print(f"sample: {said.pop()}")
        rest = list(store.folder.glob("*step*"))
        run.check_equal("files that a save to a full disk leaves", len(rest), 0)
        store.save(len(expected), state)
        store.wait()
        run.check_equal(
            "with room again it is saved, as step", max(store.steps(), default=0), len(expected)
        )
    trainee.job.barrier()


def check_same_run(run: Run, undisturbed: Trainee, resumed: Trainee, off: list[float]) -> None:
    run.check_below("losses after resuming: largest difference", max(off), 0.0, "nats")
    wrong, compared = differing(undisturbed.state(), resumed.state())
    run.metric("tensors and numbers of the final state", compared)
    run.check_equal(f"those that differ by a bit{', '.join(['', *wrong[:3]])}", len(wrong), 0)


def report_left_out(
    run: Run, differences: dict[str, list[float]], must_show: list[str], stopped: int
) -> None:
    """How far the losses after resuming are off, for each thing that was left out of the state."""
    rows = [[name, off[0], off[1], max(off), off[-1]] for name, off in differences.items()]
    columns = ["left out of the state", "1st step", "2nd step", "largest", "last step"]
    run.table(
        "left_out", columns, rows, caption="|loss − the undisturbed run's| after resuming, nats"
    )
    unnoticed = [name for name in must_show if max(differences[name]) == 0]
    run.check_equal("parts that can be left out with the same losses", len(unnoticed), 0)
    run.figure(
        "left_out", kind="line", title="A part of the state is left out",
        x_label="step", y_label="|loss − undisturbed run's| (nats)", log_y=True,
        series=[_above_zero(name, differences[name], stopped) for name in must_show],
    )  # fmt: skip


def _above_zero(name: str, off: list[float], stopped: int) -> dict[str, Any]:
    """A line of the figure, whose axis is logarithmic, from the step where losses first differ."""
    shown = [(step, value) for step, value in enumerate(off, stopped + 1) if value > 0]
    return {"label": name, "x": [step for step, _ in shown], "y": [value for _, value in shown]}


@contextmanager
def shared_folder(args: Namespace, job: Runtime) -> Iterator[Path]:
    """A new folder for all ranks, inside --folder; it goes when the run ends."""
    if args.folder is not None and not Path(args.folder).is_dir():
        raise UsageError(f"--folder {args.folder} is no folder; name one that all ranks share")
    made = [tempfile.mkdtemp(prefix="checkpoints_", dir=args.folder) if job.is_main else None]
    dist.broadcast_object_list(made, 0)
    try:
        yield Path(str(made[0]))
    finally:
        if job.is_main:
            shutil.rmtree(str(made[0]), ignore_errors=True)


if __name__ == "__main__":
    script.exit(main)
