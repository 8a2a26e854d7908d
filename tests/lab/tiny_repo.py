"""A repository of a few files that scripts/lab.py can set up in a second, for tests of the set-up.

Its lab prints what it was given. Its installer is a stand-in for uv which makes a virtual
environment without pip, puts the repository on its path, keeps a list of its calls, and misbehaves
as $FAKE_UV says; without it on the PATH the real pip installs through the small build back end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "distlab"
version = "0.1.0"
requires-python = ">=3.11"

[project.optional-dependencies]
core = []
wants = ["a-package-that-no-index-has==1.0"]

[tool.lab]
torch = "2.13.0"
torch-cpu-index = "http://127.0.0.1:9/cpu"

[tool.lab.environments.core]
gigabytes = 1
steps = [{ install = ["-e", ".[core]"] }]
check = "import distlab"

[tool.lab.environments.wants]
gigabytes = 1
steps = [{ extra = "wants" }]
check = ""

[tool.lab.environments.torch]
gigabytes = 1
steps = [
    { torch = true },
    { install = ["only-for-a-cpu"], only = "cpu" },
    { uninstall = ["torchvision"], only = "cpu" },
]
check = "import torch"
"""
LAB = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable,
                  "venv": os.environ["VIRTUAL_ENV"], "path": os.environ["PATH"]}))
sys.exit(7)
"""
BACKEND = """
import os, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "distlab-0.1.0-py3-none-any.whl"
    files = {
        "distlab.pth": os.path.join(os.getcwd(), "src"),
        "distlab-0.1.0.dist-info/METADATA":
            "Metadata-Version: 2.1\\nName: distlab\\nVersion: 0.1.0\\nProvides-Extra: core\\n",
        "distlab-0.1.0.dist-info/WHEEL":
            "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files["distlab-0.1.0.dist-info/RECORD"] = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""
FAKE_UV = """
import glob, json, os, signal, subprocess, sys, time

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
if trouble == "offline":
    fail("Failed to fetch: `https://index.invalid/simple/distlab/`")
if trouble == "only-plain-torch" and any(word.endswith("+cpu") for word in rest):
    fail("No solution found when resolving dependencies")
if rest[0] == "install":
    (site,) = glob.glob(f"{os.path.dirname(os.path.dirname(rest[2]))}/lib/*/site-packages")
    with open(f"{site}/distlab.pth", "w") as path:
        path.write(os.path.join(repo, "src"))
    version = None if rest[-1].endswith("+cpu") or trouble == "cpu-torch" else "13.0"
    with open(f"{site}/torch.py", "w") as torch:
        torch.write(f"class version:\\n    cuda = {version!r}\\n")
"""


class TinyRepo:
    """A repository in `folder`, with the stand-in for uv on the PATH unless `uv` is False."""

    def __init__(self, folder: Path, uv: bool = True, python: str = sys.executable) -> None:
        self.folder = folder
        self.python = python
        folder.mkdir(parents=True)
        shutil.copytree(SCRIPTS, folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.write("pyproject.toml", PYPROJECT)
        self.write("backend.py", BACKEND)
        self.write("src/distlab/__init__.py", "")
        self.write("src/distlab/lab/__init__.py", "")
        self.write("src/distlab/lab/__main__.py", LAB)
        self.write("uv.py", FAKE_UV)
        self.write("bin/uv", f'#!/bin/sh\nexec "{python}" "{folder}/uv.py" "$@"\n')
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
