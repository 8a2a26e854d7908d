"""The environments of pyproject.toml's [tool.lab] table, each there as a whole or not at all.

An environment is ready when its stamp, written last, carries the digest of all that goes into it.
Who builds one holds its lock, and so does the installer that it started: should lab.py be killed
outright, the next one waits until that installer, too, is gone.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("LAB_VENV_DIR") or ROOT / ".venv").expanduser().absolute()
NVIDIA_DEVICE = Path("/dev/nvidiactl")  # there where the driver is loaded and may be used


class SetupError(Exception):
    """Why an environment cannot be had, and what to do about it: one line."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(BaseException):
    """Ctrl-C, a closed terminal or a kill; `status` is what the shell expects then."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


@dataclass(frozen=True)
class Environment:
    """A recipe of [tool.lab.environments], with what this machine decides filled in."""

    name: str
    steps: list[dict]  # `only` is resolved, and a step `torch = true` names its build
    constraints: str | None
    check: str
    gigabytes: float
    torch_version: str
    torch_cpu_index: str
    digest: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def stamp(self) -> Path:
        return self.folder / ".lab-stamp.json"


def ensure(name: str, torch: str | None = None) -> Environment:
    """Return environment `name`, ready for use; build it first where it is not.

    torch: auto, cpu or cuda, remembered for all environments; None takes what is remembered.
    Raises SetupError, and Interrupted when a signal ends the building.
    """
    try:
        environment = read(name, torch_build(torch))
        if not is_ready(environment):
            build(environment)
    except OSError as error:
        raise SetupError(explain(error)) from error
    return environment


def torch_build(asked: str | None) -> str:
    """Return cpu or cuda: what is asked for, else what was last asked for, else what fits."""
    remembered = FOLDER / "torch-build.txt"
    if asked in ("cpu", "cuda"):
        FOLDER.mkdir(parents=True, exist_ok=True)
        remembered.write_text(asked)
    elif asked == "auto":
        remembered.unlink(missing_ok=True)
    if remembered.exists():
        return remembered.read_text()
    driver = NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi")
    return "cuda" if driver else "cpu"


def read(name: str, torch: str) -> Environment:
    """Read the recipe of `name` for torch's build `torch`."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lab, extras = pyproject["tool"]["lab"], pyproject["project"]["optional-dependencies"]
    recipes = lab["environments"]
    if name not in recipes:
        raise SetupError(f"env {name} is unknown; there are: {', '.join(recipes)}", status=2)
    recipe = recipes[name]
    steps = [resolve(step, torch, extras) for step in recipe["steps"] if applies(step, torch)]
    constraints = recipe.get("constraints")
    ingredients = [
        recipe,
        steps,
        {extra: extras[extra] for extra in named_extras(steps)},
        (ROOT / constraints).read_text(encoding="utf-8") if constraints else "",
        [lab["torch"], lab["torch-cpu-index"]],
        [pyproject["project"].get(key) for key in ("dependencies", "scripts", "requires-python")],
        pyproject["tool"].get("setuptools"),
        [str(ROOT), str(FOLDER / name), sys.version_info[:2]],
    ]
    return Environment(
        name=name,
        steps=steps,
        constraints=constraints,
        check=recipe.get("check", ""),
        gigabytes=recipe["gigabytes"],
        torch_version=lab["torch"],
        torch_cpu_index=lab["torch-cpu-index"],
        digest=hashlib.sha256(json.dumps(ingredients).encode()).hexdigest(),
    )


def applies(step: dict, torch: str) -> bool:
    return step.get("only", torch) == torch


def resolve(step: dict, torch: str, extras: dict[str, list[str]]) -> dict:
    if "torch" in step:
        return {"torch": torch}
    if "extra" in step:
        return {"install": extras[step["extra"]]}
    return step


def named_extras(steps: list[dict]) -> list[str]:
    """Return the extras of distlab itself that steps install, as in `.[core]`."""
    arguments = " ".join(word for step in steps for word in step.get("install", []))
    return [name for names in re.findall(r"\.\[(.+?)\]", arguments) for name in names.split(",")]


def is_ready(environment: Environment) -> bool:
    try:
        stamp = json.loads(environment.stamp.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return stamp.get("digest") == environment.digest and environment.python.exists()


def build(environment: Environment) -> None:
    """Build the environment, unless another process does so while this one waits."""
    import lab_install  # not needed, and so not loaded, where the environment is ready

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    with locked(environment) as lock:
        if is_ready(environment):
            return
        environment.stamp.unlink(missing_ok=True)
        if environment.folder.exists():
            shutil.rmtree(environment.folder)
        installer = lab_install.install(environment, lock)
        stamp = {"digest": environment.digest, "steps": environment.steps, "installer": installer}
        temporary = environment.stamp.with_suffix(".part")
        temporary.write_text(json.dumps(stamp, indent=1))
        os.replace(temporary, environment.stamp)


def interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


@contextmanager
def locked(environment: Environment) -> Iterator[int]:
    """Hold the environment's lock, and give its file descriptor."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{environment.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"lab: another process sets up {environment.folder}; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def explain(error: OSError) -> str:
    place = error.filename or FOLDER
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full at {place}; make room and run this again"
    if isinstance(error, PermissionError):
        return (
            f"no permission to write {place}; name a folder of yours in LAB_VENV_DIR, or give "
            f"{FOLDER} to the user who runs this"
        )
    return f"{place}: {error.strerror or error}; mend that and run this again"
