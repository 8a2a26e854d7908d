"""The pytest plugin that gives a grader's tests the student's adapters.

With it a student can debug a task under plain pytest:

    python -m pytest -p distlab.lab.grade_plugin --student DIR TEST_FILE
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--student", required=True, help="the directory that holds adapters.py")


@pytest.fixture(scope="session")
def student(request: pytest.FixtureRequest) -> ModuleType:
    """The student's adapters.py, as a module."""
    directory = str(Path(request.config.getoption("--student")).resolve())
    sys.path.insert(0, directory)
    return importlib.import_module("adapters")
