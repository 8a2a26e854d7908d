"""The process in which a task's tests meet the student's code (started by `lab grade`).

It reads its order (JSON: token, seconds, report, tests, student, seed, hidden) from standard
input, runs the tests and the canaries (tests that must fail) with pytest, and writes the report:
the token, and the outcome of each test.
"""

import json
import math
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # imported before any student's file of this name can be
import pytest

from distlab.files import write_text

CANARIES = Path(__file__).with_name("grade_canary.py")
LONGEST_MESSAGE = 1200


def main() -> None:
    order = json.load(sys.stdin)
    token = order.pop("token")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(math.ceil(order["seconds"]) + 5)  # the end, even if `lab grade` itself was killed
    forbid_reading(order["hidden"], order["student"])
    recorder = Recorder(Path(order["student"]), Path(order["report"]))
    pytest.main(
        [
            order["tests"],
            str(CANARIES),
            f"--student={order['student']}",
            f"--seed={order['seed']}",
            f"--rootdir={Path(order['tests']).parent}",
            f"--config-file={os.devnull}",
            "--assert=plain",
            "--capture=no",
            "--noconftest",
            "--basetemp=tmp",
            *("-p", "no:cacheprovider"),
            *("-p", "distlab.lab.grade_plugin"),
        ],
        plugins=[recorder],
    )
    report = {"token": token, "outcomes": recorder.outcomes()}
    write_text(order["report"], json.dumps(report))
    os._exit(0)  # whatever threads and exit handlers the student's code left behind


def forbid_reading(hidden: str, student: str) -> None:
    """Refuse to open any file under `hidden`, unless it is the very directory that is graded."""
    if Path(student).is_relative_to(hidden):
        return
    prefix = os.path.join(os.path.realpath(hidden), "")

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        if os.path.realpath(os.fsdecode(arguments[0])).startswith(prefix):
            raise PermissionError("the reference solution is not to be read")

    sys.addaudithook(refuse)


class Recorder:
    """The pytest plugin that keeps each test's outcome and the message that helps its reader."""

    def __init__(self, student: Path, report: Path) -> None:
        self.student = student
        self.report = report
        self.phases: dict[str, list[str]] = defaultdict(list)
        self.messages: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the test that runs, for the case that it never ends."""
        write_text(self.report, json.dumps({"running": test_name(nodeid)}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = test_name(report.nodeid)
        self.phases[name].append(str(report.when) if report.passed else report.outcome)
        if report.skipped:
            self.messages.setdefault(name, "your code skipped the test")

    def pytest_exception_interact(
        self, node: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport
    ) -> None:
        if call.excinfo is not None:
            self.messages.setdefault(node.name, self.message(call.excinfo))

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What each test gave: it passed when its set-up, its call and its teardown did."""
        return {
            name: {
                "passed": phases == ["setup", "call", "teardown"],
                "message": self.messages.get(name, ""),
            }
            for name, phases in self.phases.items()
        }

    def message(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        """What the exception says, and where in the student's code it was raised."""
        error = excinfo.value
        places = [
            f"{Path(entry.path).relative_to(self.student)}:{entry.lineno + 1}"
            for entry in excinfo.traceback
            if Path(entry.path).is_relative_to(self.student)
        ]
        said = str(error)
        if not (isinstance(error, AssertionError) and not places):
            said = f"{type(error).__name__}: {said}" if said else type(error).__name__
        if places:
            said += f" ({places[-1]})"
        return said if len(said) <= LONGEST_MESSAGE else said[:LONGEST_MESSAGE] + " …"


def test_name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


if __name__ == "__main__":
    main()
