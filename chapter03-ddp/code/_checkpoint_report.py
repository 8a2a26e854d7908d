"""What `checkpoint_resume.py` says of sizes, of what was left out, and of the time a step waits."""

import hashlib
import itertools
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from _checkpoint import Checkpoints
from _checkpoint_copies import HostCopies
from _checkpoint_encoding import encode
from _checkpoint_trainee import Trainee
from torch import nn

from distlab import measure
from distlab.model import num_parameters
from distlab.run import Run

FLOAT = 4
MOMENTS = 2  # of AdamW
SMALL_SYNCS = 4  # of state.json, manifest.json, the checkpoint's folder and the folder around it
BETWEEN_FAILURES_S = 3 * 3600.0  # for the example of how often to save


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


def report_bytes(run: Run, checkpoint: Path, model: nn.Module) -> None:
    """Weights and AdamW's two moments, all in float32; the rest is small."""
    predicted = num_parameters(model) * FLOAT * (1 + MOMENTS)
    measured = sum(file.stat().st_size for file in checkpoint.iterdir())
    run.compare("bytes of a checkpoint", predicted, measured, "B")


def report_stall(run: Run, args: Namespace, trainee: Trainee, folder: Path) -> None:
    """How long a step waits for a save, both ways in turns, and what that time consists of."""
    collecting = measure.measure(trainee.state, warmup=1, repeats=5)
    run.metric("collecting the state", collecting.median, "s", "all ranks, random states gathered")
    state = trainee.state()
    if trainee.job.is_main:
        timings = _time_saves(state, folder)
        _report_times(run, args, timings, measure.tensor_bytes(encode(state)[1].values()))
    trainee.job.barrier()


def _time_saves(state: Any, folder: Path) -> dict[str, measure.Timing]:
    """Seconds of both kinds of save, of the wait for the thread, and of the parts of a save."""
    stores = {
        way: Checkpoints(folder / way, keep=1, asynchronous=way == "asynchronous")
        for way in ("synchronous", "asynchronous")
    }
    tensors = encode(state)[1]
    host = HostCopies()
    contents = b"".join(
        t.reshape(-1).view(torch.uint8).numpy().data for t in host.take(tensors).values()
    )
    step = itertools.count()
    timings = measure.compare(
        {
            "synchronous": lambda: stores["synchronous"].save(next(step), state),
            "asynchronous": lambda: stores["asynchronous"].save(next(step), state),
            "then in the background": stores["asynchronous"].wait,
            "copy": lambda: host.take(tensors),
            "sha256": lambda: hashlib.sha256(contents).hexdigest(),
            "write and fsync": lambda: _write(folder / "plain", contents),
            "fsync of nothing": lambda: _write(folder / "plain", b"{}"),
        },
        warmup=2,  # the first asynchronous save gets its memory
        repeats=5,
    )
    for store in stores.values():
        store.close()
    return timings


def _write(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        os.fsync(file.fileno())


def _report_times(
    run: Run, args: Namespace, timings: dict[str, measure.Timing], state_bytes: int
) -> None:
    rows = []
    for way in ("synchronous", "asynchronous"):
        stall = timings[way].median
        interval = math.sqrt(2 * stall * BETWEEN_FAILURES_S)
        lost = stall / interval + interval / 2 / BETWEEN_FAILURES_S
        rows.append([way, 1e3 * stall, interval, 100 * lost])
    run.table(
        "stall", ["saving", "step waits (ms)", "save every (s)", "time lost (%)"], rows,
        caption=f"medians; Young's interval for a failure every {BETWEEN_FAILURES_S / 3600:g} h",
    )  # fmt: skip
    parts = {name: timings[name].median for name in ("copy", "sha256", "write and fsync")}
    for name, seconds in parts.items():
        run.metric(name, state_bytes / seconds, "B/s", "of the state's bytes alone")
    run.compare("stall, asynchronous: the copy", parts["copy"], timings["asynchronous"].median, "s")
    rest = parts["sha256"] + parts["write and fsync"]
    rest += SMALL_SYNCS * timings["fsync of nothing"].median
    run.compare("stall, synchronous: sha256, disk", rest, timings["synchronous"].median, "s")
    ratio = timings["asynchronous"].median / timings["synchronous"].median
    # At smoke size a save is all bookkeeping: only a lost lock or a hang would exceed the limit.
    run.check_below(
        "asynchronous / synchronous stall", ratio, 100.0 if args.preset == "smoke" else 0.75
    )
