"""What every rank of an elastic job writes at each step, and what that proves afterwards.

A line says which sequences a rank is about to train on. It is written before the gradients are
averaged, so no step can have been finished of which a rank's line is missing. It goes to the end of
the file in one `write`: a killed process has written all of it or nothing, and lines of several
ranks do not mix. (Over NFS appends are not atomic; give each rank a file of its own there.)

The job is started again and again. Each start is a generation, and begins at a checkpoint; what the
generation before had trained beyond that checkpoint is lost. The steps that remain are the final
path: the history of the weights that the job ends with.
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlab.data import Loader, Tokens
from distlab.errors import RunError

Line = dict[str, Any]
FILE = "steps.jsonl"


class StepLog:
    """One rank's pen. `generation` is set when the rank begins."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.generation = 0
        self._who = {
            "rank": rank,
            "world_size": world_size,
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, kind: str, **what: Any) -> None:
        line = {"kind": kind, "time": time.time(), "generation": self.generation}
        os.write(self._file, (json.dumps({**line, **self._who, **what}) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def read_log(folder: Path) -> list[Line]:
    """All lines so far, but the one that is being written. Raises `RunError` when one is torn."""
    path = folder / FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = []
    for number, line in enumerate(text.rpartition("\n")[0].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunError(f"{path}:{number} is torn: {line[:80]}") from error
    return lines


def of_kind(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def generations(lines: Sequence[Line]) -> list[Line]:
    """The line with which rank 0 began each generation: its world size, and where it resumed."""
    return [line for line in of_kind(lines, "begin") if line["rank"] == 0]


@dataclass(frozen=True)
class History:
    """What became of the job's steps."""

    losses: list[float]  # of the steps on the final path
    wrong: list[int]  # steps of which the final path lacks a sequence, or has one twice
    repeated: dict[int, int]  # for each generation, the steps that its beginning threw away


def history(lines: Sequence[Line], steps: int, windows: Callable[[int], Sequence[int]]) -> History:
    """Follow the generations to the final path, and compare it with `windows`, step by step.

    `windows(step)` is the step's global batch, in order, as one process would read it.
    """
    taken: dict[tuple[int, int], list[Line]] = {}  # by generation and step
    for line in of_kind(lines, "take"):
        taken.setdefault((line["generation"], line["step"]), []).append(line)
    trained = {
        (line["generation"], line["step"]): line["loss"] for line in of_kind(lines, "trained")
    }
    path: dict[int, int] = {}  # the generation of each step
    repeated = {}
    for begin in generations(lines):
        number, first = begin["generation"], begin["resumed_at"]
        repeated[number] = sum(
            step >= first and (own, step) in trained for step, own in path.items()
        )
        path = {step: own for step, own in path.items() if step < first}
        path.update({step: own for own, step in taken if own == number})
    final = [(path.get(step, 0), step) for step in range(steps)]
    return History(
        losses=[trained[key] for key in final if key in trained],
        wrong=[step for own, step in final
               if together(taken.get((own, step), [])) != list(windows(step))],
        repeated=repeated,
    )  # fmt: skip


def together(lines: Sequence[Line]) -> list[int]:
    """What the ranks took in a step, in their order; [] unless each rank took its part once."""
    ordered = sorted(lines, key=lambda line: line["rank"])
    if any([line["rank"] for line in ordered] != list(range(one["world_size"])) for one in lines):
        return []
    return [window for line in ordered for window in line["windows"]]


def global_batches(args: Namespace, tokens: Tokens) -> Callable[[int], list[int]]:
    """The windows of a step, in order, as one process reads them."""
    alone = Loader(tokens, args.seq_len, args.batch_size, seed=args.seed)
    return lambda step: alone.window_indices(step * args.batch_size).tolist()
