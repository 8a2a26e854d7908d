"""Grades many versions of a reference solution in forks of one pytest session.

A version is no attacker, so it is not graded in a process of its own as a student is, but in a fork
of this one, which has imported and collected all that the tests need.
"""

import gc
import math
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from distlab.errors import RunError
from distlab.lab.grade import Task
from distlab.lab.grade_runner import message

SOLUTION_LIMIT_S = 120.0  # as `lab grade` gives a task
LONGER_THAN_SOLUTION = 5.0  # a mutant that takes so many times its seconds runs in circles
SHORTEST_LIMIT_S = 10.0
BUSY_MACHINE = 4.0  # a limit is of processor seconds; of the clock's, so many times more: for waits
MEMORY_LIMIT = 4 * 2**30
WATCH_INTERVAL_S = 0.02
SURVIVED = ""
NO_VERSION = "raise ImportError"  # what must lose points, if tests read what is graded
ADAPTERS = "adapters.py"
LOST = "lost_test"  # the file in which a fork names it


@dataclass(frozen=True)
class End:
    """What took a version's first point: a test's name, with its message, or a limit."""

    by: str = SURVIVED
    message: str = ""


Version = dict[str, str]  # of a solution: other sources of some of its files, by their names


class Grader:
    """Grades versions of a task's reference solution, several at a time.

    It is a pytest plugin: pytest collects the task's tests once, and each version is graded in a
    fork of that session.
    """

    def __init__(
        self, task: Task, exercises: Path, seed: int, jobs: int, graded: str = ADAPTERS
    ) -> None:
        """`graded`: the file without which no point is left, else the tests read another one."""
        self.task, self.seed, self.jobs, self.graded = task, seed, jobs, graded
        self.solution = exercises / "solution"
        self.tests = exercises / "tests" / task.tests
        self.limit_s = SOLUTION_LIMIT_S

    def grade(self, versions: list[Version]) -> list[End]:
        """What took each version's first point.

        Raises `RunError` when the solution itself, which is graded first, loses points.
        """
        self.versions = versions
        self.failure = f"{self.tests} does not have the tests of tasks.toml, or cannot be imported"
        self.ends: list[End] = []
        status = pytest.main(
            [
                str(self.tests),
                f"--student={self.solution}",
                f"--seed={self.seed}",
                f"--rootdir={self.tests.parent}",
                f"--config-file={os.devnull}",
                "--assert=plain",
                "--capture=no",
                "--noconftest",
                "--disable-plugin-autoload",
                *("-p", "no:cacheprovider"),
                *("-p", "no:faulthandler"),
                *("-p", "no:terminal"),
                *("-p", "distlab.lab.grade_plugin"),
            ],
            plugins=[self],
        )
        if status == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if self.failure:
            raise RunError(self.failure)
        return self.ends

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        config.option.in_process = True  # a version runs in the fork that tests it

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if {item.name for item in session.items} >= self.task.points.keys():
            gc.freeze()  # else a fork that collects garbage copies all that was imported
            started = time.monotonic()
            [lost] = self.run(session, [{}])
            taken = time.monotonic() - started
            self.limit_s = max(SHORTEST_LIMIT_S, LONGER_THAN_SOLUTION * taken)
            if lost.by:
                self.failure = (
                    f"{self.task.name}: the solution loses points with --seed {self.seed}: "
                    f"{lost.by} {lost.message}"
                )
            elif self.run(session, [{self.graded: NO_VERSION}]) == [End()]:
                self.failure = f"{self.tests} passes without {self.graded}"
            else:
                self.failure, self.ends = "", self.run(session, self.versions)
        return True  # nothing is left for pytest to do

    def run(self, session: pytest.Session, versions: list[Version]) -> list[End]:
        ends = [End()] * len(versions)
        waiting, running = deque(enumerate(versions)), dict[int, Fork]()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    place, version = waiting.popleft()
                    running[place] = Fork(session, self.solution, version, self.limit_s)
                for place, fork in list(running.items()):
                    if (ended := fork.ended()) is not None:
                        ends[place] = ended
                        running.pop(place).end()
                time.sleep(WATCH_INTERVAL_S)
        finally:
            for fork in running.values():
                fork.end()
        return ends


class Fork:
    """A process that grades one version of a solution in a folder of its own."""

    def __init__(
        self, session: pytest.Session, solution: Path, version: Version, limit_s: float
    ) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="lab-mutate-"))
        self.limit_s, self.deadline = limit_s, time.monotonic() + BUSY_MACHINE * limit_s
        self.status: int | None = None
        for path in solution.glob("*.py"):
            shutil.copy(path, self.scratch)
        for name, source in version.items():
            (self.scratch / name).write_text(source, encoding="utf-8")
        self.pid = os.fork()
        if self.pid == 0:
            run_tests(session, self.scratch, limit_s)

    def ended(self) -> End | None:
        """As `Grader.grade` says; None while it runs."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            self.status = status
            if status == 0:
                return End()
            lost = self.scratch / LOST
            told = lost.read_text(encoding="utf-8") if lost.exists() else "its end"
            by, _, message = told.partition("\n")
            return End(by, message)
        if time.monotonic() > self.deadline:
            return End("the time limit")
        with suppress(psutil.Error):  # it ended meanwhile
            process = psutil.Process(self.pid)
            if sum(process.cpu_times()[:4]) > self.limit_s:  # its own and its children's
                return End("the time limit")
            if process.memory_info().rss > MEMORY_LIMIT:
                return End("the memory limit")
        return None

    def end(self) -> None:
        """Kill it with what it started, if it still runs, and remove its folder."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # it may not have its own group yet
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.scratch, ignore_errors=True)


class Said:
    """The pytest plugin that keeps the message of the first failure, as `lab grade` tells it."""

    message = ""

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        if call.excinfo is not None:
            self.message = self.message or message(call.excinfo.value)


def run_tests(session: pytest.Session, scratch: Path, limit_s: float) -> NoReturn:
    """In the fork: run the collected tests up to the first that fails; status 0 when none does."""
    try:
        os.setsid()
        # the end, even if `lab mutate` itself was killed
        signal.alarm(math.ceil(BUSY_MACHINE * limit_s) + 5)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.chdir(scratch)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(scratch)
        session.config.option.student = str(scratch)
        said = Said()
        session.config.pluginmanager.register(said)
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            session.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                told = f"{item.name}\n{said.message}"
                (scratch / LOST).write_text(told, encoding="utf-8", errors="backslashreplace")
                os._exit(1)
        os._exit(0)
    finally:
        os._exit(1)
