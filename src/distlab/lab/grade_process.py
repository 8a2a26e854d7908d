"""One task's tests in a process of their own: limits, and the report that it leaves."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import distlab
from distlab.lab.grade_rights import make_work

WATCH_INTERVAL_S = 0.05
CANARY = "test_canary_"  # a test that must fail, in grade_canary.py
CHANGED_TOOLS = "a test that must fail was reported as passed: your code changes the test tools"


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time, and bytes resident in all of the task's processes together."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Report:
    """Each test's {"passed": bool, "message": str}, by name; a `failure` voids them all.

    `isolation` says what kept the student's process apart from the grader's.
    """

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str = ""
    isolation: str = ""


def run_tests(
    exercises: Path, tests: str, student: Path, scratch: Path, limits: Limits, seed: int
) -> Report:
    """Run the test file `tests` against `student`, in the working directory `scratch`.

    `seed` is what the tests draw their random cases from.

    The process gets a secret by its standard input and repeats it in its report, so that a report
    counts only when the grader itself wrote it, at the very end.
    """
    token = secrets.token_hex(16)
    report_path = scratch / "report.json"
    work = scratch / "work"
    make_work(scratch)
    file = exercises / "tests" / tests
    order = {
        "token": token,
        "seconds": limits.seconds,
        "report": str(report_path),
        "tests": str(file),
        "student": str(student),
        "seed": seed,
    }
    stopped = _run_limited(json.dumps(order), packages_of(file), work, limits)
    written = _read_json(report_path)
    if stopped is not None or written.get("token") != token:
        place = f"{written['running']}: " if "running" in written else ""
        why = f"{place}{stopped or 'Python ended before the tests did'}"
        return Report(failure=why, isolation=written.get("isolation", ""))
    outcomes, isolation = written["outcomes"], written["isolation"]
    if written["failure"]:
        return Report(failure=written["failure"], isolation=isolation)
    canaries = [name for name in outcomes if name.startswith(CANARY)]
    if not canaries:
        return Report(failure="your code stopped the test run before its end")
    if any(outcomes[name]["passed"] for name in canaries):
        return Report(failure=CHANGED_TOOLS)
    return Report(outcomes, isolation=isolation)


def packages_of(tests: Path) -> list[str]:
    """What both processes import before the student's is forked."""
    source = tests.read_text(encoding="utf-8")
    return [name for name in ("numpy", "torch") if name == "numpy" or f"import {name}" in source]


def _run_limited(order: str, packages: list[str], work: Path, limits: Limits) -> str | None:
    """Run the grader's process; why it was stopped, or None when it ended by itself.

    The resident memory is watched rather than limited by the kernel: an address-space limit
    (RLIMIT_AS) stops torch, which reserves far more than it uses, and RLIMIT_DATA holds for one
    process, not for the ranks that it starts. Shared pages count once per process.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "distlab.lab.grade_runner", *packages],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=work,
        env=_environment(),
        start_new_session=True,
    )
    family: set[psutil.Process] = set()
    try:
        with suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(order.encode())
            process.stdin.close()
        deadline = time.monotonic() + limits.seconds
        while process.poll() is None:
            family |= _family(process.pid)
            if time.monotonic() > deadline:
                return f"stopped after {limits.seconds:g} s, the time limit"
            if _resident_bytes(family) > limits.memory_bytes:
                return f"stopped at {limits.memory_bytes / 2**20:,.0f} MiB, the memory limit"
            with suppress(subprocess.TimeoutExpired):
                process.wait(WATCH_INTERVAL_S)
        return None
    finally:
        _kill(process, family)


def _environment() -> dict[str, str]:
    """This process's, with `distlab` importable and nothing that changes pytest."""
    source = str(Path(distlab.__file__).parents[1])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _family(pid: int) -> set[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return {parent, *parent.children(recursive=True)}
    return set()


def _resident_bytes(family: set[psutil.Process]) -> int:
    total = 0
    for process in family:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_info().rss
    return total


def _kill(process: subprocess.Popen[bytes], family: set[psutil.Process]) -> None:
    """End the process group, and every descendant that left it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            member.kill()
    process.wait()


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written, dict):
            return written
    return {}
