"""The faults as jobs that diagnose watches: which there are, and a run of one on forked ranks.

torchrun imports torch in its own process and in each rank. A table of thirty jobs, and the tests,
need the ranks and not the launcher, so they fork them from a process that has imported torch
already, with the variables that torchrun sets.
"""

import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from ddp.diagnosis.injected.diagnose_agent.hooks import activate
from ddp.diagnosis.watching import Found, agent_variables, run_watched, watch
from distlab.cluster import unavailable
from distlab.spawning import fork_context

FOLDER = Path(__file__).parents[1] / "faults"
MARK = "# the mistake"  # in each fault's source, where its mistake is
LIMIT_S = 90.0
GRACE_S = 2.0  # that a rank has for its last words when another has failed


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


class ForkedRanks:
    """The ranks of `script`, as a job that diagnose can watch. They end with the `with` block."""

    def __init__(
        self,
        script: Path,
        argv: Sequence[str],
        world_size: int,
        env: dict[str, str],
        limit_s: float,
    ) -> None:
        self.command = [str(script), *argv]
        self.world_size, self.env = world_size, env
        self.failed_at: float | None = None
        self.until = time.monotonic() + limit_s

    def __enter__(self) -> Self:
        context = fork_context()
        self.folder = tempfile.TemporaryDirectory()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            context.Process(target=_run_rank, args=(self.command, self._variables(rank),
                                                    self._file("stdout"), self._file("stderr")))
            for rank in range(self.world_size)
        ]  # fmt: skip
        for rank in self.ranks:
            rank.start()
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        self.folder.cleanup()

    def poll(self) -> int | None:
        """None while a rank runs, else 0 or 1, as torchrun has it; 124 after the limit."""
        statuses = [rank.exitcode for rank in self.ranks]
        if any(statuses) and None in statuses:
            self._end_the_others()
        if None not in statuses:
            return max((s if s > 0 else 1 for s in statuses if s), default=0)
        return 124 if time.monotonic() > self.until else None

    def _end_the_others(self) -> None:
        """As torchrun does: one that gloo left spinning after a failure never ends itself."""
        self.failed_at = self.failed_at or time.monotonic()
        if time.monotonic() > self.failed_at + GRACE_S:
            for rank in self.ranks:
                rank.terminate()

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status

    def output(self) -> str:
        return Path(self._file("stdout")).read_text(errors="replace", encoding="utf-8")

    def errors(self) -> str:
        return Path(self._file("stderr")).read_text(errors="replace", encoding="utf-8")

    def _file(self, stream: str) -> str:
        return str(Path(self.folder.name) / stream)

    def _variables(self, rank: int) -> dict[str, str]:
        count = str(self.world_size)
        return {
            **self.env,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process's store: rank 0 opens no port
        }


def end_fork_server() -> None:
    """End the process that forks, and wait for it: it would outlive this one by a moment."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _run_rank(command: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream.fileno())
    os.environ.update(env)
    torch.set_num_threads(1)  # as torchrun has it; too late for OMP_NUM_THREADS
    if "DIAGNOSE_DIR" in env:
        activate()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
