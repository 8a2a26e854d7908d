"""What tests of the chapter share: one SGLang server, which takes half a minute to start."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlab.files import repo_root
from distlab.lab.blocks import environment_python
from distlab.service import Service, free_port, service

START_S = 400.0


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    return python_of("sglang")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    return python_of("vllm")


@pytest.fixture(scope="session")
def sglang_server(sglang_python: Path, one_cache: None) -> Iterator[Service]:
    """The tiny model behind sglang_server.sh; `.url` is without /v1."""
    url = f"http://127.0.0.1:{free_port()}"
    command = ["bash", "chapter07-sglang/code/sglang_server.sh", "--port", url.rpartition(":")[2]]
    path = f"{sglang_python.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "LAB_PRESET": "smoke"}
    ready = f"{url}/health"
    with service(command, ready, env, repo_root(), name="SGLang", start_s=START_S) as server:
        server.url = url
        yield server


def python_of(environment: str) -> Path:
    """The environment's Python, as it stands. Only CI builds it: a test does not fetch gigabytes
    unasked, nor replace an environment that others use, because its pins have changed."""
    folder = Path(os.environ.get("LAB_VENV_DIR") or repo_root() / ".venv", environment)
    if (folder / ".lab-stamp.json").is_file():
        return folder / "bin" / "python"
    if os.environ.get("CI") == "true":
        return environment_python(environment)
    pytest.skip(f"no environment {environment}; python3 scripts/lab.py env {environment} builds it")
