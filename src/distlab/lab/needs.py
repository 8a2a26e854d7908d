"""What the chapters need of a machine, whether it is here, and the command that mends it."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sysconfig
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distlab import hardware
from distlab.cluster import slurm
from distlab.cluster.availability import (
    allow_namespaces,
    find_program,
    install_line,
    namespace_flags,
)
from distlab.environments.recipes import pyproject
from distlab.files import repo_root
from distlab.host import own_address
from distlab.lab.lessons import chapters

ALL = tuple(range(1, 12))
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NVIDIA_PCI_VENDOR = "0x10de"
COMPILED = "torch.compile, DeepSpeed, the paged engine's operators"
ENVIRONMENTS = (  # beside core: name, chapters, what for
    ("deepspeed", (5,), "DeepSpeed's compiled operators"),
    ("vllm", (6, 7, 9), "the vLLM engine"),
    ("sglang", (7, 9), "the SGLang engine"),
    ("routers", (7,), "the routers that ours is compared with"),
    ("triton", (6,), "tests of the engine's CUDA kernel without a GPU"),
    ("tracing", (9,), "Phoenix, which shows traces"),
    ("bench", (6, 7, 10), "genai-bench and LoadGen"),
    ("flower", (11,), "Flower's simulation and deployment"),
)


@dataclass(frozen=True)
class Need:
    """Something that `chapters` use `purpose` for.

    `probe` returns what it found in a few words, None where it is missing; `remedy` is the command
    line that mends that, empty where none can. `packages` are the system packages, by their Debian
    names, that hold it.
    """

    chapters: tuple[int, ...]
    what: str
    purpose: str
    probe: Callable[[], str | None]
    remedy: str
    packages: tuple[str, ...] = ()


def needs() -> list[Need]:
    """All that the eleven chapters need beyond Python itself, in the order of the chapters."""
    return [
        Need(ALL, "Python packages", "every script", _core_packages, _env("core")),
        Need(ALL, "NVIDIA driver", "GPUs; without one all runs on the CPU", _driver, _get_driver()),
        Need(ALL, "the host's name", "torchrun, without the lab", own_address, _name_itself()),
        *_system_needs(),
        Need(
            (2, 3, 4, 5, 6, 7, 8, 10),
            "user namespaces",
            "the virtual cluster, without root",
            _namespaces,
            allow_namespaces(),
        ),
        *(
            Need(
                who,
                f"environment {name}",
                why + cost(name),
                partial(_environment, name),
                with_packages(name),
                tuple(recipe(name).get("system", [])),
            )
            for name, who, why in ENVIRONMENTS
        ),
    ]


def _system_needs() -> list[Need]:
    def system(who: Iterable[int], what: str, why: str, probe: Callable, *packages: str) -> Need:
        return Need(tuple(who), what, why, probe, install_line(packages), packages)

    python = f"python{'.'.join(platform.python_version_tuple()[:2])}-dev"
    clustered = (2, 3, 4, 5, 6, 7, 8, 10)
    return [
        system(ALL, "chromium", "the test of lab report", partial(_one_of, CHROMIUM), "chromium"),
        system((1, 3, 5, 6, 7), "C++ compiler", COMPILED, partial(_one_of, ["g++"]), "g++"),
        system((1, 3, 5, 6, 7), "Python headers", COMPILED, _python_headers, python),
        system(clustered, "ip and tc", "nodes and shaped links", _iproute2, "iproute2"),
        system(
            (2, 3, 4, 5),
            "Slurm",
            "jobs on the virtual cluster",
            partial(_all_of, slurm.PROGRAMS),
            *slurm.PACKAGES,
        ),
        system((3,), "nft", "a firewall between nodes", partial(_all_of, ["nft"]), "nftables"),
        system((7,), "wrk", "load for the routers", partial(_all_of, ["wrk"]), "wrk"),
        system((5,), "libaio", "offload to NVMe", _libaio, "libaio-dev"),
    ]


def chapter_rows(wanted: list[Need], found: list[str | None]) -> list[list[str]]:
    """A row for each chapter: its number, its title, and what it lacks of what can be had here."""
    lacking = [n for n, what in zip(wanted, found, strict=True) if what is None and n.remedy]
    rows = []
    for chapter in chapters():
        missing = [need.what for need in lacking if chapter.number in need.chapters]
        rows.append([str(chapter.number), chapter.title, ", ".join(missing) or "✓"])
    return rows


def remedies(wanted: list[Need], found: list[str | None]) -> list[list[str]]:
    """A row for each missing thing that can be had: what, for which chapters, by which command."""
    return [
        [need.what, in_words(need.chapters), need.remedy]
        for need, what in zip(wanted, found, strict=True)
        if what is None and need.remedy
    ]


def in_words(numbers: Iterable[int]) -> str:
    """Chapter numbers, runs joined: (1, 2, 3, 5) is `1-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def missing_system_packages() -> list[str]:
    """The system packages that the chapters written so far need and this machine lacks."""
    written = {chapter.number for chapter in chapters() if chapter.written}
    wanted = [need for need in needs() if need.packages and written & set(need.chapters)]
    missing = [need.packages for need in wanted if need.probe() is None]
    return list(dict.fromkeys(package for packages in missing for package in packages))


def _env(name: str) -> str:
    return f"python3 scripts/lab.py env {name}"


def _name_itself() -> str:
    root = "" if os.geteuid() == 0 else "sudo "
    return f"echo 127.0.1.1 {socket.gethostname()} | {root}tee -a /etc/hosts"


def _core_packages() -> str | None:
    """How many packages of pyproject.toml's extra `core` there are, if none is missing."""
    project = tomllib.loads((repo_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [re.split(r"[^\w.-]", line)[0] for line in project["optional-dependencies"]["core"]]
    try:
        for name in wanted:
            importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"all {len(wanted)}"


def recipe(name: str) -> dict[str, Any]:
    """The environment's row of pyproject.toml."""
    return pyproject()["tool"]["lab"]["environments"][name]


def cost(name: str) -> str:
    """What building and keeping the environment takes."""
    return f" ({recipe(name)['minutes']:g} min, {recipe(name)['gigabytes']:g} GB)"


def with_packages(name: str) -> str:
    """The line that sets the environment up, after the system packages that it needs."""
    packages = recipe(name).get("system", [])
    return " && ".join([*([install_line(packages)] if packages else []), _env(name)])


def _environment(name: str) -> str | None:
    """Whether it is built, as it stands, and in how many minutes that was done here."""
    folder = Path(os.environ.get("LAB_VENV_DIR") or repo_root() / ".venv", name)
    if not (folder / ".lab-stamp.json").is_file():
        return None
    seconds = json.loads((folder / ".lab-stamp.json").read_text(encoding="utf-8")).get("seconds")
    return "built" if seconds is None else f"built in {seconds / 60:.1f} min"


def _driver() -> str | None:
    if not hardware.driver_present():
        return None
    return hardware.machine().driver or "loaded"


def _get_driver() -> str:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if any(vendor.read_text(encoding="utf-8").strip() == NVIDIA_PCI_VENDOR for vendor in vendors):
        return install_line(["nvidia-driver"])
    return ""  # there is no GPU to drive


def _one_of(programs: Iterable[str]) -> str | None:
    return next(filter(None, map(shutil.which, programs)), None)


def _all_of(programs: Iterable[str]) -> str | None:
    """The first program's path, if all are there."""
    found = [find_program(program) for program in programs]
    return found[0] if all(found) else None


def _iproute2() -> str | None:
    return _all_of(["ip", "tc"])


def _python_headers() -> str | None:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return str(header.parent) if header.is_file() else None


def _libaio() -> str | None:
    for folder in ("/usr/include", "/usr/local/include"):
        if (header := Path(folder, "libaio.h")).is_file():
            return str(header)
    return None


def _namespaces() -> str | None:
    """Whether the kernel lets this user make the namespaces of the virtual cluster."""
    flags = namespace_flags()
    if flags is None:
        return None
    return "allowed" if "--user" in flags else "not needed by root"
