"""What several tests of the chapter share: the environment of vLLM."""

import os
from pathlib import Path

import pytest

from distlab.files import repo_root
from distlab.lab.blocks import environment_python


@pytest.fixture
def vllm_python() -> Path:
    """The environment's Python, as it stands. Only CI builds it: a test does not fetch gigabytes
    unasked, nor replace an environment that others use, because its pins have changed."""
    folder = Path(os.environ.get("LAB_VENV_DIR") or repo_root() / ".venv", "vllm")
    if (folder / ".lab-stamp.json").is_file():
        return folder / "bin" / "python"
    if os.environ.get("CI") == "true":
        return environment_python("vllm")
    pytest.skip("the environment vllm is not built; python3 scripts/lab.py env vllm builds it")
