"""`lab grade CH DIR`: what a student's directory earns against a chapter's grader.

A chapter's exercises/ folder holds tasks.toml (the tasks, and the points of each of their tests),
tests/ (the grader), starter/ (what a student begins with) and solution/ (full marks; a student's
tree has none). Each task runs in processes of its own, with a time limit and a memory limit.

The student's code runs in one of them, which holds neither the tests nor what they expect, and is
kept from the checkout as far as the system allows: `grade_rights` says how, and what that does not
prevent; the output says how far it came ("isolation"). Grade strangers' work in a container or a
virtual machine all the same.
"""

import argparse
import json
import secrets
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distlab.errors import UsageError
from distlab.files import refuse_unwritable_file, repo_root, write_text
from distlab.lab.grade_process import Limits, run_tests
from distlab.script import OneLineParser, non_negative_int, positive_float, positive_int

FULL_MARKS, POINTS_MISSING = 0, 1
LARGEST_SEED = 10**6  # short enough to be copied by hand


@dataclass(frozen=True)
class Task:
    """One task of tasks.toml: the file `tests`, and the `points` of each test in it."""

    name: str
    title: str
    tests: str
    points: dict[str, int]


@dataclass(frozen=True)
class Mark:
    """What one test gave; `message` says what is wrong where points are missing."""

    name: str
    points: int
    max_points: int
    message: str


@dataclass(frozen=True)
class TaskGrade:
    """What one task gave; `message` is its first failing test's."""

    name: str
    title: str
    points: int
    max_points: int
    message: str
    isolation: str
    tests: list[Mark]


def grade(argv: list[str]) -> int:
    """Grade and print; 0 for full marks, 1 where points are missing.

    Raises `UsageError` for an unknown chapter or task and for a directory that cannot be graded.
    """
    args = parse_args(argv)
    exercises = find_exercises(args.chapter)
    tasks = chosen_tasks(read_tasks(exercises), args.task)
    student = checked_directory(args.directory, exercises)
    limits = Limits(args.time_limit, args.memory_limit * 2**20)
    seed = secrets.randbelow(LARGEST_SEED) if args.seed is None else args.seed
    grades = [grade_task(task, exercises, student, limits, seed) for task in tasks]

    record = {
        "chapter": args.chapter,
        "directory": args.directory,
        "seed": seed,
        "isolation": next((task.isolation for task in grades if task.isolation), "unknown"),
        "points": sum(task.points for task in grades),
        "max_points": sum(task.max_points for task in grades),
        "tasks": [asdict(task) for task in grades],
    }
    text = json.dumps(record, indent=2)
    if args.json == "-":
        print(text)
    else:
        print(as_text(record))
        if args.json:
            write_text(args.json, text + "\n")
    return FULL_MARKS if record["points"] == record["max_points"] else POINTS_MISSING


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="lab grade", description="Grade a directory of exercises.")
    parser.add_argument("chapter", metavar="CH", type=positive_int, help="the chapter's number")
    parser.add_argument("directory", metavar="DIR", help="the student's directory")
    parser.add_argument("--task", metavar="NAME", help="grade this task only")
    parser.add_argument("--json", metavar="FILE", help="write the grades to FILE; - prints them")
    parser.add_argument(
        "--time-limit", metavar="S", type=positive_float, default=120.0, help="seconds per task"
    )
    parser.add_argument(
        "--memory-limit", metavar="MB", type=positive_int, default=4096, help="MiB per task"
    )
    parser.add_argument(
        "--seed", metavar="N", type=non_negative_int, help="draw the random cases from N again"
    )
    args = parser.parse_args(argv)
    if args.json and args.json != "-":
        refuse_unwritable_file("--json", args.json)
    return args


def find_exercises(chapter: int) -> Path:
    """The exercises folder of a chapter."""
    folders = {
        int(path.parts[-3][len("chapter") :][:2]): path.parent
        for path in repo_root().glob("chapter[0-9][0-9]-*/exercises/tasks.toml")
    }
    if chapter not in folders:
        known = ", ".join(map(str, sorted(folders)))
        raise UsageError(f"chapter {chapter} has no exercises; use one of: {known}")
    return folders[chapter]


def read_tasks(exercises: Path) -> list[Task]:
    """The tasks of a chapter, in order."""
    with (exercises / "tasks.toml").open("rb") as file:
        return [Task(**entry) for entry in tomllib.load(file)["task"]]


def chosen_tasks(tasks: list[Task], name: str | None) -> list[Task]:
    chosen = [task for task in tasks if name in (None, task.name)]
    if not chosen:
        raise UsageError(
            f"--task {name} is not known; use one of: {', '.join(task.name for task in tasks)}"
        )
    return chosen


def checked_directory(directory: str, exercises: Path) -> Path:
    """The absolute path of a directory that can be graded."""
    student = Path(directory).resolve()
    starter = (exercises / "starter").relative_to(repo_root())
    if not student.is_dir():
        raise UsageError(f"DIR {directory} is no directory; begin with a copy of {starter}")
    if not (student / "adapters.py").is_file():
        raise UsageError(
            f"DIR {directory} has no adapters.py, which binds your code to the grader; "
            f"begin with a copy of {starter}"
        )
    for path in sorted(student.glob("*.py")):
        if path.stem in sys.stdlib_module_names:
            raise UsageError(
                f"{directory}/{path.name} hides Python's own module {path.stem}; rename it"
            )
    return student


def grade_task(task: Task, exercises: Path, student: Path, limits: Limits, seed: int) -> TaskGrade:
    """Run the tests of one task, their random cases drawn from `seed`, and count what they give."""
    with tempfile.TemporaryDirectory(prefix="lab-grade-") as scratch:
        report = run_tests(exercises, task.tests, student, Path(scratch), limits, seed)
    tests = [
        mark_of(name, points, report.outcomes.get(name), report.failure)
        for name, points in task.points.items()
    ]
    return TaskGrade(
        name=task.name,
        title=task.title,
        points=sum(test.points for test in tests),
        max_points=sum(test.max_points for test in tests),
        message=report.failure or first_message(tests),
        isolation=report.isolation,
        tests=tests,
    )


def mark_of(name: str, points: int, outcome: Any, failure: str) -> Mark:
    """A test counts when it was run and passed, and nothing spoils the whole report."""
    if failure:
        return Mark(name, 0, points, failure)
    if outcome is None:
        return Mark(name, 0, points, "the test was not run to its end")
    passed = outcome["passed"] is True
    return Mark(name, points if passed else 0, points, "" if passed else outcome["message"])


def first_message(tests: list[Mark]) -> str:
    return next((f"{test.name}: {test.message}" for test in tests if test.message), "")


def as_text(record: dict[str, Any]) -> str:
    """The grades as a person reads them."""
    width = max(len(task["name"]) for task in record["tasks"])
    lines = []
    for task in record["tasks"]:
        points = f"{task['points']}/{task['max_points']}"
        lines.append(f"{task['name']:<{width}}  {points:>5}  {task['title']}")
        lines += [f"    {line}" for line in task["message"].splitlines()]
    total = f"{record['points']}/{record['max_points']} points"
    place = f"chapter {record['chapter']}, {record['directory']}, --seed {record['seed']}"
    apart = f"your code's process is kept apart by: {record['isolation']}"
    return "\n".join([*lines, apart, f"{place}: {total}"])
