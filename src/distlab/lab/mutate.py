"""`lab mutate CH`: whether a chapter's tests notice simple changes of its reference solution.

Every mutant is a file of exercises/solution/ with one change (see `mutants`). It is graded against
the task of the file's name, up to the first point that it loses. One that loses none shows a case
that the tests lack, or changes nothing that the task promises. The second kind is listed in
exercises/solution/equivalent.toml, with the reason:

    [[mutants]]
    file = "uneven_shards.py"
    function = "combine_gradients"
    changes = ["total = sum(counts) → total = sum(counts) + 0"]
    reason = "a sum does not change by 0"

The status is 0 when every survivor is listed, and everything listed is a survivor. With --wrong the
mistakes are those that somebody wrote down instead, in exercises/solution/wrong/TASK/: each takes
the place of some adapters, must lose points, and names in SAYS what its author must be told. A
mutant is no
attacker, so it is not graded in a process of its own as a student is, but in a fork of this one,
which has imported and collected all that the tests need.
"""

import argparse
import ast
import gc
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from distlab.display import text_table
from distlab.errors import RunError, Skipped
from distlab.files import refuse_unwritable_file, write_text
from distlab.host import usable_cores
from distlab.lab.grade import Task, chosen_tasks, find_exercises, read_tasks
from distlab.lab.grade_runner import message
from distlab.lab.mutants import Mutant, mutants_of
from distlab.script import OneLineParser, non_negative_int, positive_int

ALL_ACCOUNTED_FOR, FAULTS = 0, 1
COLUMNS = ["task", "mutants", "killed", "listed", "not listed", "killed of the not listed (%)"]
SOLUTION_LIMIT_S = 120.0  # as `lab grade` gives a task
LONGER_THAN_SOLUTION = 5.0  # a mutant that takes so many times its seconds runs in circles
SHORTEST_LIMIT_S = 10.0
MEMORY_LIMIT = 4 * 2**30
WATCH_INTERVAL_S = 0.02
SURVIVED = ""
NO_VERSION = "raise ImportError"  # what must lose points, if tests read what is graded
ADAPTERS = "adapters.py"
LOST = "lost_test"  # the file in which a fork names it
Key = tuple[str, str, str]  # file, function, change


@dataclass(frozen=True)
class Trial:
    """A mutant of a task's file, and what took its first point: a test's name, or a limit."""

    task: str
    file: str
    mutant: Mutant
    ended_by: str
    reason: str  # why it is listed as equivalent; empty: it is not

    @property
    def survived(self) -> bool:
        return self.ended_by == SURVIVED

    @property
    def place(self) -> str:
        return f"{self.file}:{self.mutant.line} {self.mutant.function}: {self.mutant.change}"

    def as_record(self) -> dict[str, Any]:
        made = asdict(self.mutant)
        del made["source"]
        return {
            "task": self.task,
            "file": self.file,
            **made,
            "ended_by": self.ended_by or None,
            "reason": self.reason or None,
        }


def mutate(argv: list[str]) -> int:
    """Make the mutants, grade them, and print a table; 0 when the survivors are those listed.

    Raises `UsageError` for an unknown chapter or task, `Skipped` in a tree without solutions, and
    `RunError` for a solution without full marks and an equivalent.toml that cannot be read.
    """
    args = parse_args(argv)
    exercises = find_exercises(args.chapter)
    solution = exercises / "solution"
    if not solution.is_dir():
        raise Skipped(f"chapter {args.chapter} has no solution here: this is a student's tree")
    listed = read_listed(solution / "equivalent.toml")
    tasks = chosen_tasks(read_tasks(exercises), args.task)
    files = [file_of(task, solution) for task in tasks]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # mutants run side by side instead
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.dont_write_bytecode = True
    preload(files)
    if args.wrong:
        return grade_wrong(args, exercises, tasks)
    trials, stale = [], []
    for task, file in zip(tasks, files, strict=True):
        of_task, not_made = try_task(task, exercises, file, listed, args)
        trials += of_task
        stale += not_made
        lost = sum(not trial.survived for trial in of_task)
        print(f"{task.name}: {lost} of {len(of_task)} lost points", file=sys.stderr, flush=True)
    return report(args, trials, stale)


def file_of(task: Task, solution: Path) -> Path:
    file = solution / f"{task.name.replace('-', '_')}.py"
    if not file.is_file():
        raise RunError(f"the task {task.name} has no {file}, which would be mutated")
    return file


def try_task(
    task: Task, exercises: Path, file: Path, listed: dict[Key, str], args: argparse.Namespace
) -> tuple[list[Trial], list[Key]]:
    """The task's trials, and what is listed of its file and not made."""
    mutants = mutants_of(file.read_text(encoding="utf-8"))
    stale = {key for key in listed if key[0] == file.name}
    stale -= {(file.name, mutant.function, mutant.change) for mutant in mutants}
    if args.limit:
        mutants = mutants[:: math.ceil(len(mutants) / args.limit)]
    grader = Grader(task, exercises, args.seed, args.jobs, graded=file.name)
    ends = grader.grade([{file.name: mutant.source} for mutant in mutants])
    trials = [
        Trial(task.name, file.name, mutant, ended.by, listed.get(key, ""))
        for mutant, ended in zip(mutants, ends, strict=True)
        for key in [(file.name, mutant.function, mutant.change)]
    ]
    return trials, sorted(stale)


def grade_wrong(args: argparse.Namespace, exercises: Path, tasks: list[Task]) -> int:
    """Grade the mistakes of solution/wrong/; 0 when each loses points and is told what it SAYS."""
    adapters = (exercises / "solution" / ADAPTERS).read_text(encoding="utf-8")
    made: list[dict[str, str]] = []
    for task in tasks:
        files = sorted((exercises / "solution" / "wrong" / task.name).glob("*.py"))
        texts = [file.read_text(encoding="utf-8") for file in files]
        grader = Grader(task, exercises, args.seed, args.jobs)
        ends = grader.grade([{ADAPTERS: f"{adapters}\n{text}"} for text in texts])
        for file, text, end in zip(files, texts, ends, strict=True):
            told = {"ended_by": end.by, "message": end.message, "says": said_by(text)}
            made.append({"task": task.name, "file": file.stem, **told})
    faults = [
        f"{one['task']}/{one['file']} keeps its points"
        if one["ended_by"] == SURVIVED
        else f"{one['task']}/{one['file']} is not told {one['says']!r}: {one['message']}"
        for one in made
        if one["ended_by"] == SURVIVED or one["says"] not in f"{one['ended_by']}: {one['message']}"
    ]
    print(
        "\n".join([*faults, f"chapter {args.chapter}: {len(made)} mistakes, {len(faults)} faults"])
    )
    if args.json:
        record = {"chapter": args.chapter, "seed": args.seed, "mistakes": made, "faults": faults}
        write_text(args.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return ALL_ACCOUNTED_FOR if not faults else FAULTS


def said_by(source: str) -> str:
    """The text that SAYS holds."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SAYS":
            return str(ast.literal_eval(node.value))
    raise RunError(f"a mistake has no SAYS: {source[:60]!r}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="lab mutate", description="Try whether tests notice changes of the solution."
    )
    parser.add_argument("chapter", metavar="CH", type=positive_int, help="the chapter's number")
    parser.add_argument("--task", metavar="NAME", help="this task only")
    parser.add_argument(
        "--wrong", action="store_true", help="instead grade the mistakes in solution/wrong/"
    )
    parser.add_argument(
        "--seed", metavar="N", type=non_negative_int, default=0, help="of the random cases"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=positive_int, default=usable_cores(), help="mutants at a time"
    )
    parser.add_argument("--json", metavar="FILE", help="write what became of every mutant to FILE")
    parser.add_argument(
        "--limit", metavar="N", type=positive_int, help="at most N mutants of each task, spread"
    )
    args = parser.parse_args(argv)
    if args.json:
        refuse_unwritable_file("--json", args.json)
    return args


def read_listed(path: Path) -> dict[Key, str]:
    """The reasons of an equivalent.toml, by file, function and change."""
    if not path.exists():
        return {}
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutants"]
        reasons = {
            (entry["file"], entry["function"], change): entry["reason"].strip()
            for entry in entries
            for change in entry["changes"]
        }
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: {error!r}; see the head of distlab/lab/mutate.py") from error
    for (file, function, change), reason in reasons.items():
        if not reason:
            raise RunError(f"{path}: {file} {function}: {change} has no reason")
    return reasons


def preload(files: list[Path]) -> None:
    """Import what the files import at their heads."""
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                importlib.import_module(node.module)


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
        self.deadline = time.monotonic() + limit_s
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
            if psutil.Process(self.pid).memory_info().rss > MEMORY_LIMIT:
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
        signal.alarm(math.ceil(limit_s) + 5)  # the end, even if `lab mutate` itself was killed
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


def report(args: argparse.Namespace, trials: list[Trial], stale: list[Key]) -> int:
    """Print a table, and each survivor and list entry that should not be; the command's status."""
    names = list(dict.fromkeys(trial.task for trial in trials))
    rows = [row(name, [trial for trial in trials if trial.task == name]) for name in names]
    if len(rows) > 1:
        rows.append(row("together", trials))
    print(text_table(COLUMNS, rows))
    faults = [
        f"no test notices {trial.place}" for trial in trials if trial.survived and not trial.reason
    ]
    faults += [
        f"listed as equivalent, but {trial.ended_by} notices {trial.place}"
        for trial in trials
        if trial.reason and not trial.survived
    ]
    faults += [f"listed as equivalent, but not made: {': '.join(key)}" for key in stale]
    print("\n".join([*faults, f"chapter {args.chapter}, --seed {args.seed}: {verdict(faults)}"]))
    if args.json:
        record = {
            "chapter": args.chapter,
            "seed": args.seed,
            "tasks": [dict(zip(COLUMNS, cells, strict=True)) for cells in rows],
            "mutants": [trial.as_record() for trial in trials],
            "faults": faults,
        }
        write_text(args.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return ALL_ACCOUNTED_FOR if not faults else FAULTS


def row(name: str, trials: list[Trial]) -> list[Any]:
    """A row of the table; the share is of the mutants that are not equivalent."""
    listed = sum(trial.survived and bool(trial.reason) for trial in trials)
    unlisted = sum(trial.survived and not trial.reason for trial in trials)
    killed = len(trials) - listed - unlisted
    return [name, len(trials), killed, listed, unlisted, 100 * killed / max(1, killed + unlisted)]


def verdict(faults: list[str]) -> str:
    return f"{len(faults)} to mend" if faults else "every survivor is listed"
