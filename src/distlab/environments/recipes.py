"""What goes into an environment: its row of pyproject.toml's [tool.lab], and what is decided here.

An environment is ready when its stamp, written last, carries the digest of all that goes into it.
"""

import hashlib
import json
import os
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("LAB_VENV_DIR") or ROOT / ".venv").expanduser().absolute()
NVIDIA_DEVICE = Path("/dev/nvidiactl")  # there where the driver is loaded and may be used
BUILDS = ("cpu", "cuda")


class SetupError(Exception):
    """Why an environment cannot be had, and what to do about it: one line."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Environment:
    """A recipe of [tool.lab.environments], with what this machine decides filled in."""

    name: str
    torch: str  # its build, cpu or cuda
    torch_version: str
    extra: str  # of pyproject.toml: what is installed, and its lock's name
    alone: bool  # that extra's requirements only, without distlab and torch
    requirements: list[str]  # what the lock is made from
    without: list[str]  # packages that others ask for and that are left out
    check: str
    minutes: float
    gigabytes: float
    system: list[str]
    digest: str = ""

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

    @property
    def lock(self) -> Path:
        return ROOT / "constraints" / f"{self.extra}.txt"

    def read_stamp(self) -> dict[str, Any] | None:
        """What was noted when it was built, whether or not it is what is wanted now."""
        try:
            return json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def is_ready(self) -> bool:
        stamp = self.read_stamp()
        return stamp is not None and stamp.get("digest") == self.digest and self.python.exists()


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names() -> list[str]:
    return list(pyproject()["tool"]["lab"]["environments"])


def read(name: str, torch: str) -> Environment:
    """Read the recipe of environment `name` for torch's build `torch`."""
    project = pyproject()
    lab, recipes = project["tool"]["lab"], project["tool"]["lab"]["environments"]
    if name not in recipes:
        raise SetupError(f"env {name} is unknown; there are: {', '.join(recipes)}", status=2)
    recipe = recipes[name]
    extra = recipe["extra"] if isinstance(recipe["extra"], str) else recipe["extra"][torch]
    alone = recipe.get("alone", False)
    own = [] if alone else project["project"].get("dependencies", [])
    values: dict[str, Any] = {
        "name": name,
        "torch": torch,
        "torch_version": recipe.get("torch", {}).get(torch, lab["torch"]),
        "extra": extra,
        "alone": alone,
        "requirements": [*own, *project["project"]["optional-dependencies"][extra]],
        "without": recipe.get("cpu-without", []) if torch == "cpu" else [],
        "check": recipe["check"],
        "minutes": recipe["minutes"],
        "gigabytes": recipe["gigabytes"],
        "system": recipe.get("system", []),
    }
    environment = Environment(**values)
    ingredients = [
        {key: value for key, value in values.items() if key not in ("minutes", "gigabytes")},
        environment.lock.read_text(encoding="utf-8") if environment.lock.exists() else "",
        lab["torch-cpu-index"],
        [project["project"].get(key) for key in ("scripts", "entry-points", "requires-python")],
        project["tool"].get("setuptools"),
        [str(ROOT), str(environment.folder), sys.version_info[:2]],
    ]
    digest = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
    return Environment(**values, digest=digest)


def torch_build(asked: str | None = None) -> str:
    """Return cpu or cuda: what is asked for, else what was last asked for, else what fits."""
    remembered = FOLDER / "torch-build.txt"
    if asked in BUILDS:
        FOLDER.mkdir(parents=True, exist_ok=True)
        remembered.write_text(asked, encoding="utf-8")
    elif asked == "auto":
        remembered.unlink(missing_ok=True)
    if remembered.exists():
        return remembered.read_text(encoding="utf-8")
    driver = NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi")
    return "cuda" if driver else "cpu"
