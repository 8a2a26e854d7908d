"""The pytest plugin that gives a grader's tests the student's adapters.

With it a student can debug a task under plain pytest:

    python -m pytest -p distlab.lab.grade_plugin --student DIR --seed N TEST_FILE

There, too, the student's code runs in a process of its own. `--in-process` takes it into the tests'
process instead, where breakpoints work, and where nothing keeps it from what the tests know.
"""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlab.lab.grade_rights import make_work
from distlab.lab.grade_student import Student, fork_student


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--student", required=True, help="the directory that holds adapters.py")
    parser.addoption("--seed", type=int, default=0, help="what the random cases are drawn from")
    parser.addoption("--in-process", action="store_true", help="no process of the student's own")


@pytest.hookimpl(tryfirst=True)  # before pytest settles on its --basetemp
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--in-process"):
        return
    if (process := running(config)) is None:
        process = fork_student()
        config.pluginmanager.register(process)
        folder = Path(tempfile.mkdtemp(prefix="lab-student-"))
        config.option.basetemp = folder / "work" / "tests"
        make_work(folder)
        process.start(Path(config.getoption("--student")).resolve(), folder / "work", quiet=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    if process := running(config):
        process.stop()


def running(config: pytest.Config) -> Student | None:
    """The student's process: started by the grader, or by this plugin."""
    plugins = config.pluginmanager.get_plugins()
    return next((plugin for plugin in plugins if isinstance(plugin, Student)), None)


@pytest.fixture(scope="session")
def student(request: pytest.FixtureRequest) -> Any:
    """The student's adapters.py: a handle on it, or the module itself."""
    if process := running(request.config):
        return process.adapters()
    sys.path.insert(0, str(Path(request.config.getoption("--student")).resolve()))
    return importlib.import_module("adapters")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """pytest's, open to the student's process."""
    for folder in (tmp_path.parent, tmp_path):
        folder.chmod(0o777)
    return tmp_path


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> np.random.Generator:
    """Draws a test's random cases: others with each seed, and in each test; the same on a rerun."""
    name = request.node.name.encode()
    return np.random.default_rng([request.config.getoption("--seed"), *name])
