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
the place of some adapters, must lose points, and names in SAYS what its author must be told.
`grade_versions` grades both kinds.
"""

import argparse
import ast
import importlib
import json
import math
import os
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distlab.display import text_table
from distlab.errors import RunError, Skipped
from distlab.files import refuse_unwritable_file, write_text
from distlab.host import usable_cores
from distlab.lab.grade import Task, chosen_tasks, find_exercises, read_tasks
from distlab.lab.grade_versions import ADAPTERS, SURVIVED, Grader
from distlab.lab.mutants import Mutant, mutants_of
from distlab.script import OneLineParser, non_negative_int, positive_int

ALL_ACCOUNTED_FOR, FAULTS = 0, 1
COLUMNS = ["task", "mutants", "killed", "listed", "not listed", "killed of the not listed (%)"]
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
