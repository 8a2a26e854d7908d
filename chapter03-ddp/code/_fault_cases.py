"""The faults as jobs that diagnose watches: which there are, and one run of one of them."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from _diagnose_ranks import ForkedRanks
from diagnose import Found, agent_variables, run_watched, watch

from distlab.cluster import unavailable

FOLDER = Path(__file__).parent / "faults"
MARK = "# the mistake"  # in each fault's source, where its mistake is
LIMIT_S = 90.0


@dataclass(frozen=True)
class Case:
    """One fault; its name is the cause that diagnose is to find."""

    cause: str
    flags: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return FOLDER / f"{self.cause}.py"

    @property
    def name(self) -> str:
        return " ".join([self.cause, *self.flags])

    @property
    def has_own_nodes(self) -> bool:
        return self.cause == "dead_link"

    def line(self) -> int:
        """The line of its mistake."""
        lines = self.script.read_text(encoding="utf-8").splitlines()
        (line,) = [number for number, text in enumerate(lines, 1) if MARK in text]
        return line


CASES = (
    Case("rank_only_collective"),
    Case("collective_order"),
    Case("shape_mismatch"),
    Case("shape_mismatch", ("--dtype",)),
    Case("lock_deadlock"),
    Case("uneven_last_batch"),
    Case("dead_link"),
    Case("killed_rank"),
    Case("unsynced_parameters"),
    Case("unsynced_buffers"),
    Case("nan_on_one_rank"),
    Case("straggler"),
    Case("forgotten_set_epoch"),
    Case("same_device"),
    Case("forgotten_set_device"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a run under diagnose."""

    found: Found | None
    status: int
    output: str = ""


def cannot_run(case: Case) -> str | None:
    """Why this machine cannot run a fault; None when it can."""
    if case.has_own_nodes:
        return unavailable()
    if case.cause == "forgotten_set_device" and torch.cuda.device_count() < 2:
        return "it needs two GPUs"
    return None


def run_case(case: Case, fix: bool, stall_after: float) -> Outcome:
    """A fault, or its cured version, under diagnose, on two ranks."""
    flags = [*case.flags, *(["--fix"] if fix else [])]
    if torch.cuda.device_count() < 2:
        flags += ["--device", "cpu"]
    if case.has_own_nodes:
        command = ["env", "LAB_RECORD_DIR=", sys.executable, str(case.script), *flags]
        return Outcome(*run_watched(command, stall_after))
    with tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        env = {"OMP_NUM_THREADS": "1", "LAB_RECORD_DIR": ""}
        env |= agent_variables(Path(folder), stall_after)
        with ForkedRanks(case.script, flags, 2, env, LIMIT_S) as job:
            found = watch(job, Path(folder), stall_after, set())
            return Outcome(found, 1 if found else job.wait(), job.output() + job.errors())
