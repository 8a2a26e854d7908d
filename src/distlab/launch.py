"""What a launcher tells its processes: torchrun's variables, Slurm's, an MPI's, or none."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distlab.errors import UsageError

INTERACTIVE_STEP = 0xFFFFFFFA  # Slurm's id of the step in which salloc's own shell runs
MPIS = (  # rank, size, local rank, local size; names of Open MPI, MVAPICH, and MPICH and Intel MPI
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
     "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID")  # the same in all of a job


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its job, as its launcher says.

    None: the launcher does not say. To guess would put four ranks on one GPU, or refuse four that
    have one each; `distlab.runtime` asks the ranks instead.
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    master_addr: str | None = None
    master_port: int | None = None


def detect_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables (also DeepSpeed's, accelerate's and Kubernetes operators'), else
    Slurm's (inside `srun`), else mpirun's; else this process is alone.

    Raises `UsageError` when a launcher's variables are incomplete.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
        return Launch(
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None,
            local_world_size=_integer(env, local_size) if local_size in env else None,
            master_addr=_required(env, "MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT"),
        )
    if (tasks := _tasks_of_step(env)) > 1:
        return Launch(
            rank=_integer(env, "SLURM_PROCID"),
            world_size=tasks,
            local_rank=_integer(env, "SLURM_LOCALID"),
            local_world_size=_tasks_of_node(env),
            master_addr=env.get("MASTER_ADDR") or first_host(_required(env, "SLURM_STEP_NODELIST")),
            master_port=_integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else _job_port(env),
        )
    if "RANK" in env or "WORLD_SIZE" in env:  # alone, each rank would believe to be the whole job
        _required(env, "RANK")
        _required(env, "WORLD_SIZE")
    for names in MPIS:
        if names[0] in env and _integer(env, names[1], "1") > 1:
            return _mpi(env, *names)
    return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def world_size(env: Mapping[str, str] = os.environ) -> int:
    """The ranks of the job, also where its launcher's other variables are incomplete."""
    if "WORLD_SIZE" in env:
        return _integer(env, "WORLD_SIZE")
    of_mpi = (_integer(env, size) for _, size, *_ in MPIS if size in env)
    return max(_tasks_of_step(env), next(of_mpi, 1))


def own_rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's rank, also where its launcher's other variables are incomplete."""
    names = ("RANK", "SLURM_PROCID", *(rank for rank, *_ in MPIS))
    return next((_integer(env, name) for name in names if name in env), 0)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's list: `gpu[07-09,12],login` gives `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)  # commas within brackets do not end it
    if first is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _tasks_of_step(env: Mapping[str, str]) -> int:
    """The tasks that `srun` started with this one; 1 in a batch script or an interactive shell,
    which have the whole allocation's SLURM_NTASKS and are one process."""
    step = env.get("SLURM_STEP_ID")
    if step is None or step == str(INTERACTIVE_STEP):
        return 1
    own = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _integer(env, own, "1")


def _tasks_of_node(env: Mapping[str, str]) -> int | None:
    """Slurm writes `2(x3),1` for three nodes of two tasks and one of one."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = _integer(env, "SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else None


def _job_port(env: Mapping[str, str]) -> int:
    """One port a job, so that two jobs on one node do not meet; below Linux's ephemeral ports."""
    return 20000 + _integer(env, "SLURM_JOB_ID") % 12000


def _mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Launch:
    """mpirun tells everything but where rank 0 is, which matters on several nodes."""
    world, local = _integer(env, size), _integer(env, local_size, "0") or None
    if "MASTER_ADDR" not in env and local != world:
        raise UsageError(
            f"mpirun started {world} ranks on several nodes and does not tell where rank 0 is; "
            "use mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500, HOST being rank 0's"
        )
    job = next((env[name] for name in MPI_JOBS if name in env), str(os.getppid()))
    of_job = 20000 + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % 12000
    return Launch(
        rank=_integer(env, rank),
        world_size=world,
        local_rank=_integer(env, local_rank) if local_rank in env else None,
        local_world_size=local,
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_integer(env, "MASTER_PORT", str(of_job)),
    )


def _integer(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default) if default is not None else _required(env, name)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text} is no number; start by torchrun, or unset it") from None


def _required(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise UsageError(
            f"{name} is not set, but other launcher variables are; start by torchrun, "
            "or unset RANK and WORLD_SIZE to run alone"
        )
    return env[name]
