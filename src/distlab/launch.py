"""What a launcher tells its processes: torchrun's variables, or Slurm's, or none."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distlab.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its job, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None = None
    master_port: int | None = None


def detect_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else Slurm's (inside `srun`), else this process is alone.

    Raises `UsageError` when a launcher's variables are incomplete.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK", "0"),
            local_world_size=_integer(env, "LOCAL_WORLD_SIZE", env["WORLD_SIZE"]),
            master_addr=_required(env, "MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT"),
        )
    if "SLURM_STEP_ID" in env and _integer(env, "SLURM_NTASKS", "1") > 1:
        return Launch(
            rank=_integer(env, "SLURM_PROCID"),
            world_size=_integer(env, "SLURM_NTASKS"),
            local_rank=_integer(env, "SLURM_LOCALID"),
            local_world_size=_first_count(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            master_addr=env.get("MASTER_ADDR") or first_host(_required(env, "SLURM_STEP_NODELIST")),
            master_port=_integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else _job_port(env),
        )
    if "RANK" in env or "WORLD_SIZE" in env:  # alone, each rank would believe to be the whole job
        _required(env, "RANK")
        _required(env, "WORLD_SIZE")
    return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's list: `gpu[07-09,12],login` gives `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)  # commas within brackets do not end it
    if first is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _first_count(tasks_per_node: str) -> int:
    """Slurm writes `2(x3),1` for three nodes of two tasks and one of one."""
    return int(re.match(r"\d+", tasks_per_node)[0])  # type: ignore[index]


def _job_port(env: Mapping[str, str]) -> int:
    """One port a job, so that two jobs on one node do not meet; below Linux's ephemeral ports."""
    return 20000 + _integer(env, "SLURM_JOB_ID") % 12000


def _integer(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default) if default is not None else _required(env, name)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text} is no number; start by torchrun") from None


def _required(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise UsageError(f"{name} is not set, but other launcher variables are; start by torchrun")
    return env[name]
