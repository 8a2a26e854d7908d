"""Who am I in this job: rank, world size, device, back end, and a process group that ends cleanly.

The same script runs alone (`python x.py`), under torchrun and its like, under Slurm (`srun python
x.py`) and under mpirun.
"""

import argparse
import json
import os
import random
import re
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from distlab.errors import RunError, UsageError
from distlab.launch import Launch, detect_launch

DEFAULT_TIMEOUT_S = 60.0
has_joined = False  # a process group, in this process: see `distlab.script.exit`
LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (?:closed|reset)|[Tt]imed? ?out|pair closure|broken pipe"
)
NO_ADDRESS = re.compile(r"Unable to find address for: (\S+)")  # gloo's, of GLOO_SOCKET_IFNAME


@dataclass(frozen=True)
class Runtime:
    """What a script needs to know of its job; a torch.distributed process group exists with it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str
    gpus: int = 0  # different ones that the ranks of the job have

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank, at most the process group's timeout."""
        if self.backend == "nccl":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what was queued on it; nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --timeout and --seed, for a script that runs on several ranks."""
    from distlab.script import seconds, seed

    group = parser.add_argument_group("job")
    group.add_argument("--backend", choices=["auto", "nccl", "gloo"], default="auto")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "--timeout", type=seconds, default=DEFAULT_TIMEOUT_S, help="of a collective, seconds"
    )
    group.add_argument("--seed", type=seed, default=0)


@contextmanager
def distributed(
    backend: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[Runtime]:
    """Join the job's process group, and leave it at the end, after an error, and on Ctrl-C.

    `backend` auto means NCCL with a GPU for each rank, else gloo. With `backend="gloo"` on a
    machine with GPUs, ranks share them; `device="cpu"` leaves the GPUs alone. All ranks get the
    same `seed`. `timeout_s` bounds every collective, also of groups that are made later without a
    timeout, as DeepSpeed's and a DeviceMesh's: torch's own default is 30 minutes for gloo.

    Raises `UsageError` when there are more ranks than GPUs for NCCL, or no GPU where one was asked,
    and `RunError`, in one line that names the script's own, when a collective fails because a rank
    is gone or did not come in time.
    """
    launch = detect_launch()
    kind = _choose_kind(backend, device)
    chosen = _choose_backend(backend, kind)
    seed_everything(seed)
    with _meeting(launch, timeout_s):
        store = _meet(launch, timeout_s)
        everyone = _introduce(store, launch, _visible_gpus() if kind == "cuda" else [])
        local_rank, local_world_size = _among_neighbours(launch, everyone)
        place, gpus = _choose_device(launch, everyone, kind, backend)
        if kind == "cuda":
            torch.cuda.set_device(place)
        _join(store, launch, chosen, timeout_s, place)
        _wait_for_all(store, launch)
    runtime = Runtime(
        launch.rank, launch.world_size, local_rank, local_world_size, place, chosen, gpus
    )
    try:
        yield runtime
    except BaseException as error:
        _leave(chosen, failed=True)
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            raise RunError(_lost_peer(error, runtime, timeout_s)) from error
        raise
    _leave(chosen, failed=False)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _choose_kind(backend: str, device: str) -> str:
    """cpu or cuda, by the flags and what is here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        if backend == "nccl":
            raise UsageError("--backend nccl needs GPUs and none is used here; use --backend gloo")
        return "cpu"
    if gpus == 0:
        raise UsageError("--device cuda: there is no CUDA device here; use --device cpu")
    return "cuda"


def _choose_backend(backend: str, kind: str) -> str:
    if backend != "auto":
        return backend
    return "nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo"


@dataclass(frozen=True)
class _Rank:
    """What a rank tells the others of itself: its host, and the ids of the GPUs that it can see."""

    host: str
    gpus: tuple[str, ...]


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def _introduce(store: dist.Store, launch: Launch, gpus: Sequence[str]) -> list[_Rank]:
    """Everybody's `_Rank`, by rank."""
    own = {"host": socket.gethostname(), "gpus": list(gpus)}
    store.set(f"distlab/rank{launch.rank}", json.dumps(own))
    told = [json.loads(store.get(f"distlab/rank{rank}")) for rank in range(launch.world_size)]
    return [_Rank(one["host"], tuple(one["gpus"])) for one in told]


def _among_neighbours(launch: Launch, everyone: Sequence[_Rank]) -> tuple[int, int]:
    """Local rank and local world size: what the launcher says, else by the ranks' own hosts."""
    here = everyone[launch.rank].host
    neighbours = [rank for rank, one in enumerate(everyone) if one.host == here]
    local_rank, size = launch.local_rank, launch.local_world_size
    return (
        neighbours.index(launch.rank) if local_rank is None else local_rank,
        len(neighbours) if size is None else size,
    )


def _choose_device(
    launch: Launch,
    everyone: Sequence[_Rank],
    kind: str,
    backend: str,
) -> tuple[torch.device, int]:
    """This rank's device, and how many different GPUs the job has.

    A launcher may show every rank all GPUs of the node, or each its own (`srun --gpus-per-task=1`):
    in the order of ranks, each takes the first that it can see and nobody has; where all are
    taken, gloo's ranks share them.
    """
    if kind == "cpu":
        return torch.device("cpu"), 0
    chosen: list[tuple[str, str]] = []  # of each rank: host and GPU
    index = 0
    for rank, one in enumerate(everyone):
        before = sum(host == one.host for host, _ in chosen)
        free = (i for i, gpu in enumerate(one.gpus) if (one.host, gpu) not in chosen)
        place = next(free, before % max(1, len(one.gpus)))
        chosen.append((one.host, one.gpus[place] if one.gpus else ""))
        index = place if rank == launch.rank else index
    per_gpu = Counter(chosen)
    if backend != "gloo" and (crowded := next((h for (h, _), n in per_gpu.items() if n > 1), "")):
        ranks = sum(one.host == crowded for one in everyone)  # all ranks see it, and all end here
        gpus = sum(host == crowded for host, _ in per_gpu)
        raise UsageError(
            f"{ranks} ranks on {gpus} GPU(s): NCCL wants a GPU for each rank; "
            f"use --nproc_per_node={gpus}, or --backend gloo to share, or --device cpu"
        )
    return torch.device("cuda", index), len(set(chosen))


@contextmanager
def _meeting(launch: Launch, timeout_s: float) -> Iterator[None]:
    """Turn what goes wrong when ranks meet into one line."""
    started = time.monotonic()
    try:
        yield
    except (RuntimeError, socket.gaierror) as error:  # the store's and gloo's are RuntimeErrors
        if isinstance(error, UsageError):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if interface := NO_ADDRESS.search(first_line):
            raise UsageError(
                f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')}: {interface[1]} is no "
                f"network interface with an address; use one of {_interfaces()}, or unset it"
            ) from error
        waited = time.monotonic() - started  # gloo's may be five timeouts, for a silent address
        raise RunError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{launch.master_addr}:{launch.master_port} in {waited:.1f} s "
            f"(timeout {timeout_s:g} s): {first_line}{_if_nobody_launched()}"
        ) from error


def _interfaces() -> str:
    """This machine's network interfaces that have an address of the Internet's."""
    found = psutil.net_if_addrs().items()
    families = (socket.AF_INET, socket.AF_INET6)
    named = [name for name, addresses in found if any(a.family in families for a in addresses)]
    return ", ".join(sorted(named))


def _if_nobody_launched() -> str:
    """A shell may still have the variables of an earlier job, or of a scheduler's."""
    if "RANK" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return ""
    return "; if nobody started the others, unset RANK and WORLD_SIZE to run alone"


def _meet(launch: Launch, timeout_s: float) -> dist.Store:
    """The store that all ranks of the job have in common; alone, without a port or a network."""
    global has_joined
    has_joined = True
    if launch.master_addr is None:
        return dist.HashStore()
    os.environ["MASTER_ADDR"] = launch.master_addr
    os.environ["MASTER_PORT"] = str(launch.master_port)
    ranks = {"rank": launch.rank, "world_size": launch.world_size}
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", **ranks, timeout=timeout))
    store.set_timeout(timeout)
    return store


def _join(
    store: dist.Store, launch: Launch, backend: str, timeout_s: float, device: torch.device
) -> None:
    limit = timedelta(seconds=timeout_s)
    torchs = dist.distributed_c10d  # a later group takes its default, and not the first group's
    torchs.default_pg_timeout = torchs.default_pg_nccl_timeout = limit
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=limit,
        device_id=device if backend == "nccl" else None,
    )


def _wait_for_all(store: dist.Store, launch: Launch) -> None:
    """Nobody goes on before all have met: a short job's first rank would close its connections
    while a slower one still opens them. By the store, as a collective would count as the script's.
    """
    others = [rank for rank in range(launch.world_size) if rank != launch.rank]
    if not others:
        return
    store.set(f"distlab/met{launch.rank}", "")
    store.wait([f"distlab/met{rank}" for rank in others])
    store.set(f"distlab/knows{launch.rank}", "")
    if launch.rank == 0:  # with which the store may end
        store.wait([f"distlab/knows{rank}" for rank in others])


def _leave(backend: str, failed: bool) -> None:
    """Destroy the group; after a failure NCCL's is aborted, since its peers may never answer."""
    if not dist.is_initialized():
        return
    if failed and backend == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _lost_peer(error: RuntimeError, runtime: Runtime, timeout_s: float) -> str:
    """One line for a failed collective: who, where in the script, and what the back end said."""
    installed = str(Path(torch.__file__).parents[1])  # torch and DeepSpeed, which is in between
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(installed)]
    last = (own or frames)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    said = re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0])
    return (
        f"rank {runtime.rank} of {runtime.world_size} lost the others at {where}: a rank is gone, "
        f"or did not come within {timeout_s:g} s ({said})"
    )
