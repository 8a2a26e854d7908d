"""A run's record: what was run, on which machine, and what came out, as JSON on disk."""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distlab.errors import RunError
from distlab.files import repo_root, write_text
from distlab.launch import world_size

SCHEMA = 1
RECORDED_PACKAGES = ("torch", "numpy", "transformers", "deepspeed", "vllm", "sglang", "flwr")


def describe_run(preset: str) -> dict[str, Any]:
    """What ran and where: command, commit, time, machine, versions."""
    from distlab.hardware import machine

    return {
        "schema": SCHEMA,
        "command": command_line(),
        "preset": preset,
        "world_size": world_size(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": dataclasses.asdict(machine()),
        "versions": installed_versions(),
    }


def command_line() -> str:
    """The line that started this process: `python …`, by torchrun, srun or mpirun.

    On the virtual cluster (`lab cluster` says so in $LAB_CLUSTER) with the line that made it.
    """
    cluster = os.environ.get("LAB_CLUSTER")
    return f"{cluster} -- {_typed()}" if cluster else _typed()


def _typed() -> str:
    script = Path(sys.argv[0]).resolve()
    root = repo_root()
    shown = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    words = [str(shown), *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([*_launcher(), "python", *words])
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [f"--nnodes={world // local}"] if world > local else []
    return shlex.join(["torchrun", *nodes, f"--nproc_per_node={local}", *words])


def commit() -> str | None:
    """The checkout's commit, with `+` when files differ from it; None outside a checkout."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(
            describe,
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or one that waits for a slow disk
        return None
    return result.stdout.strip() or None


def _launcher() -> list[str]:
    """What was typed before `python`, where it was no torchrun: srun, mpirun, or nothing."""
    tasks = world_size()
    if tasks == 1 or "WORLD_SIZE" in os.environ:
        return []
    by_slurm = "SLURM_STEP_ID" in os.environ
    return ["srun", f"--ntasks={tasks}"] if by_slurm else ["mpirun", "-n", str(tasks)]


def installed_versions() -> dict[str, str]:
    """The versions of the packages that decide a result, those that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(record: dict[str, Any], path: str | Path) -> None:
    """Write `record` to `path` atomically; NaN and infinities become null, as JSON has none."""
    write_text(path, json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises `RunError` when it is missing or is none."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as a run's record: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RunError(f"{path} is no record of schema {SCHEMA}; record it again")
    return record


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: NumPy and torch numbers and arrays become numbers and lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Path) or type(value).__name__ in ("dtype", "device"):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch
        return _plain(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else None
