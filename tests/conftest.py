"""What the whole suite shares: where it is, and the ledger of what every command did."""

import json
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Tests prove results, not speed. With a thread for each core, OpenMP's threads spin while they wait
# for each other, and on a machine that does something else too a test takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the background of a script (`&`, nohup, many CI runners) SIGINT is ignored, and all that tests
# start would inherit that. A handler of Python's own becomes the default in what is started.
if threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from distlab.display import text_table
from distlab.errors import RunError
from distlab.files import repo_root, write_text
from distlab.hardware import has_cuda
from distlab.lab.blocks import Outcome, environment_python

LONG = ["test_commands.py", "test_grade.py", "test_train_slurm.py"]  # files, in this order
SLOWEST = 25  # files, in the table of where the time went
LEDGER = "ledger"  # the name of a test's property: what its block did


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return repo_root()


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenizers, shards and kernels made by the suite are shared by its tests, and leave with it.

    The processes of `lab test` share them too: each has a folder of its own in one of the run's.
    """
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    os.environ.setdefault("DISTLAB_CACHE", str(of_all / "cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """No test leaves its variables to the next one, as a command called in this process may."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


class Ledger:
    """Every block × back end × ranks: ran, failed or skipped, and why.

    A test's report carries its row, since the test may run in another process than the one that
    prints the ledger.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self.properties = properties

    def add(self, outcome: Outcome) -> None:
        row = {
            "block": outcome.block.id,
            "backend": outcome.backend,
            "ranks": outcome.block.ranks,
            "result": outcome.result,
            "reason": outcome.reason,
            "seconds": round(outcome.seconds, 1),
        }
        self.properties.append((LEDGER, row))


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return Ledger(request.node.user_properties)


@pytest.hookimpl(tryfirst=True)  # before the tier is chosen by its mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests are slow, which need a GPU, and which come first.

    A chapter's own tests are not in the fast tier, which keeps its time as chapters come. It has
    the bench, the lab, and the first commands of each lesson; `lab test 3` has the rest.

    The lessons' commands come first: a newcomer wants to know of those, and what takes long must
    not begin when the other processes of `lab test` have nothing left to do.
    """
    for item in items:
        if item.path.parent.name.startswith(("chapter", "cluster")):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


ENVIRONMENT_OF = {
    "vllm_python": "vllm",
    "bench_python": "bench",
    "sglang_python": "sglang",
    "routers_python": "routers",
    "triton_packages": "triton",
    "deepspeed_operators": "deepspeed",
}


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout's clock starts
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """An environment that `lab test` builds meanwhile is waited for outside the test's limit."""
    wanted = {ENVIRONMENT_OF.get(name) for name in getattr(item, "fixturenames", ())}
    if block := getattr(getattr(item, "callspec", None), "params", {}).get("block"):
        wanted.add(getattr(block, "env", None))
    for name in set(os.environ.get("LAB_TEST_ENVIRONMENTS", "").split()) & wanted:
        with suppress(RunError):  # the test says why it cannot be had
            environment_python(name)
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For `lab test`: a file's tests in one process, but the commands of each chapter in its own.

    README's first commands run the tour and chapter 1, and tell what became of their commands: all
    of those stay together.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndChapter(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, lesson = nodeid.partition("::test_command[")
            chapter = lesson.partition("/")[0]
            if chapter.startswith("chapter") and not chapter.startswith("chapter01"):
                return f"{file}::{chapter}"
            return super()._split_scope(nodeid)

    return ByFileAndChapter(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the ledger, write it to build/ledger.json, and say what every skip was for."""
    reports = [
        report
        for of_outcome in terminalreporter.stats.values()
        for report in of_outcome
        if isinstance(report, pytest.TestReport)
    ]
    tell_slowest_files(terminalreporter, reports)
    calls = [report for report in reports if report.when == "call"]
    rows = [
        row
        for report in calls
        for name, row in report.user_properties
        if name == LEDGER and isinstance(row, dict)
    ]
    rows.sort(key=_place)
    skips = [
        {"test": report.nodeid, "reason": str(report.longrepr[2]).removeprefix("Skipped: ")}
        for report in terminalreporter.stats.get("skipped", [])
    ]
    if not rows and not skips:
        return
    write_text(
        repo_root() / "build" / "ledger.json",
        json.dumps({"blocks": rows, "skipped_tests": skips}, indent=1) + "\n",
    )
    if rows:
        columns = ["block", "back end", "ranks", "result", "seconds", "why"]
        cells = [
            [r["block"], r["backend"], r["ranks"], r["result"], r["seconds"], _first_line(r)]
            for r in rows
        ]
        terminalreporter.write_line(text_table(columns, cells, "ledger of the lessons' commands"))
    others = [s for s in skips if "test_commands" not in s["test"]]
    for skip in others:
        terminalreporter.write_line(f"skipped {skip['test']}: {skip['reason']}")


def tell_slowest_files(terminalreporter, reports: list[pytest.TestReport]) -> None:
    """Where the time went: seconds of each file's tests, with their fixtures."""
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        seconds[report.nodeid.partition("::")[0]] += report.duration
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    if len(seconds) > 1:
        title = f"slowest files, of {sum(seconds.values()):.0f} s in all processes together"
        terminalreporter.write_line(text_table(["file", "seconds"], slowest, title))


def _place(row: dict) -> tuple[str, int]:
    lesson, _, line = row["block"].rpartition(":")
    return lesson, int(line)


def _first_line(row: dict) -> str:
    return row["reason"].splitlines()[0][:70] if row["reason"] else ""
