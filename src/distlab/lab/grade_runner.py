"""The process in which a task's tests run (started by `lab grade`).

First it forks the student's process. Then it reads its order (JSON: token, seconds, report, tests,
student, seed) from standard input, runs the tests and the canaries (tests that must fail) with
pytest, and writes the report: the token, how far the student's process is isolated, why nothing
counts (if so), and the outcome of each test. Its arguments are the packages that both processes
need: they are imported once.
"""

import ctypes
import importlib
import json
import math
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlab.files import write_text
from distlab.lab.grade_handles import BrokenWire
from distlab.lab.grade_rights import PR_SET_DUMPABLE
from distlab.lab.grade_student import Student, fork_student

if TYPE_CHECKING:
    import pytest

CANARIES = Path(__file__).with_name("grade_canary.py")
LONGEST_MESSAGE = 1200


def main() -> None:
    for package in sys.argv[1:]:
        importlib.import_module(package)
    process = fork_student()
    order = json.load(sys.stdin)
    token = order.pop("token")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(math.ceil(order["seconds"]) + 5)  # the end, even if `lab grade` itself was killed
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)  # no other process looks into this one
    process.start(Path(order["student"]), Path.cwd(), quiet=True)
    recorder = Recorder(Path(order["report"]), process.isolation)
    run_tests(order, process, recorder)
    report = {
        "token": token,
        "isolation": process.isolation,
        "failure": process.failure,
        "outcomes": recorder.outcomes(),
    }
    write_text(order["report"], json.dumps(report))
    os._exit(0)


def run_tests(order: dict[str, Any], process: Student, recorder: "Recorder") -> None:
    import pytest

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
            "--basetemp=tests",
            *("-p", "no:cacheprovider"),
            *("-p", "distlab.lab.grade_plugin"),
        ],
        plugins=[recorder, process],
    )


class Recorder:
    """The pytest plugin that keeps each test's outcome and the message that helps its reader."""

    def __init__(self, report: Path, isolation: str) -> None:
        self.report = report
        self.isolation = isolation
        self.phases: dict[str, list[str]] = defaultdict(list)
        self.messages: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the test that runs, for the case that it never ends."""
        running = {"running": test_name(nodeid), "isolation": self.isolation}
        write_text(self.report, json.dumps(running))

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        name = test_name(report.nodeid)
        self.phases[name].append(str(report.when) if report.passed else report.outcome)
        if report.skipped:
            self.messages.setdefault(name, "your code skipped the test")

    def pytest_exception_interact(
        self, node: "pytest.Item", call: "pytest.CallInfo[Any]", report: "pytest.TestReport"
    ) -> None:
        if call.excinfo is not None:
            self.messages.setdefault(node.name, message(call.excinfo.value))

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What each test gave: it passed when its set-up, its call and its teardown did."""
        return {
            name: {
                "passed": phases == ["setup", "call", "teardown"],
                "message": self.messages.get(name, ""),
            }
            for name, phases in self.phases.items()
        }


def message(error: BaseException) -> str:
    """What the exception says, and where in the student's code it was raised."""
    said, place = str(error), getattr(error, "place", "")
    if not (isinstance(error, AssertionError | BrokenWire) and not place):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if place:
        said += f" ({place})"
    return said if len(said) <= LONGEST_MESSAGE else said[:LONGEST_MESSAGE] + " …"


def test_name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


if __name__ == "__main__":
    main()
