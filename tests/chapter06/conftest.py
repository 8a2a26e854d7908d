"""What tests of the chapter share: the environments of vLLM, genai-bench and Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlab.files import repo_root
from distlab.lab.blocks import environment_python


@pytest.fixture
def vllm_python() -> Path:
    """The Python of the environment vllm."""
    return python_of("vllm")


@pytest.fixture
def bench_python() -> Path:
    """The Python of the environment bench, which has genai-bench."""
    if sys.version_info >= (3, 13):
        pytest.skip("genai-bench needs Python 3.12 or older")
    return python_of("bench")


@pytest.fixture
def triton_packages() -> Path:
    """The folder of the environment triton from which another Python imports it."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux only")
    wanted = "import sysconfig; print(sysconfig.get_path('purelib'))"
    command = [str(python_of("triton")), "-c", wanted]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def python_of(environment: str) -> Path:
    """The environment's Python, as it stands. Only CI builds it: a test does not fetch gigabytes
    unasked, nor replace an environment that others use, because its pins have changed."""
    folder = Path(os.environ.get("LAB_VENV_DIR") or repo_root() / ".venv", environment)
    if (folder / ".lab-stamp.json").is_file():
        return folder / "bin" / "python"
    if os.environ.get("CI") == "true":
        return environment_python(environment)
    pytest.skip(f"no environment {environment}; python3 scripts/lab.py env {environment} builds it")
