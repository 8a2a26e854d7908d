"""The pytest plugin that gives a grader's tests the student's adapters.

With it a student can debug a task under plain pytest:

    python -m pytest -p distlab.lab.grade_plugin --student DIR --seed N TEST_FILE
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--student", required=True, help="the directory that holds adapters.py")
    parser.addoption("--seed", type=int, default=0, help="what the random cases are drawn from")


@pytest.fixture(scope="session")
def student(request: pytest.FixtureRequest) -> ModuleType:
    """The student's adapters.py, as a module."""
    directory = str(Path(request.config.getoption("--student")).resolve())
    sys.path.insert(0, directory)
    return importlib.import_module("adapters")


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> np.random.Generator:
    """Draws a test's random cases: others with each seed, and in each test; the same on a rerun."""
    name = request.node.name.encode()
    return np.random.default_rng([request.config.getoption("--seed"), *name])
