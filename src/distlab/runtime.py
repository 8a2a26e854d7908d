"""Who am I in this job: rank, world size, device, back end, and a process group that ends cleanly.

The same script runs alone (`python x.py`), under torchrun, and under Slurm (`srun python x.py`).
"""

import argparse
import multiprocessing
import os
import pickle
import random
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distlab.errors import RunError, UsageError

DEFAULT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its job, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True)
class Runtime:
    """What a script needs to know of its job; a torch.distributed process group exists with it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str

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
    from distlab.script import positive_float

    group = parser.add_argument_group("job")
    group.add_argument("--backend", choices=["auto", "nccl", "gloo"], default="auto")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "--timeout", type=positive_float, default=DEFAULT_TIMEOUT_S, help="of a collective, seconds"
    )
    group.add_argument("--seed", type=int, default=0)


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
    same `seed`. `timeout_s` bounds every collective: torch's own default is 30 minutes for gloo.

    Raises `UsageError` when there are more ranks than GPUs for NCCL, or no GPU where one was asked.
    """
    launch = detect_launch()
    place = _choose_device(launch, backend, device)
    chosen = _choose_backend(backend, place)
    seed_everything(seed)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    _join(launch, chosen, timeout_s, place)
    runtime = Runtime(
        launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, place, chosen
    )
    try:
        yield runtime
    except BaseException:
        _leave(chosen, failed=True)
        raise
    _leave(chosen, failed=False)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def detect_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's variables, else Slurm's (inside `srun`), else this process is alone.

    Raises `UsageError` when a launcher's variables are incomplete.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            master_addr=_required(env, "MASTER_ADDR"),
            master_port=int(_required(env, "MASTER_PORT")),
        )
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return Launch(
            rank=int(_required(env, "SLURM_PROCID")),
            world_size=int(env["SLURM_NTASKS"]),
            local_rank=int(_required(env, "SLURM_LOCALID")),
            local_world_size=_first_count(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            master_addr=env.get("MASTER_ADDR") or first_host(_required(env, "SLURM_STEP_NODELIST")),
            # One port a job, so that two jobs on one node do not meet.
            master_port=int(env.get("MASTER_PORT", 20000 + int(env["SLURM_JOB_ID"]) % 20000)),
        )
    return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's list: `gpu[07-09,12],login` gives `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]\-,]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _first_count(tasks_per_node: str) -> int:
    """Slurm writes `2(x3),1` for three nodes of two tasks and one of one."""
    return int(re.match(r"\d+", tasks_per_node)[0])  # type: ignore[index]


def _required(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise UsageError(f"{name} is not set, but other launcher variables are; start by torchrun")
    return env[name]


def _choose_device(launch: Launch, backend: str, device: str) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        if backend == "nccl":
            raise UsageError("--backend nccl needs GPUs and none is used here; use --backend gloo")
        return torch.device("cpu")
    if gpus == 0:
        raise UsageError("--device cuda: there is no CUDA device here; use --device cpu")
    if launch.local_world_size > gpus and backend != "gloo":
        raise UsageError(
            f"{launch.local_world_size} ranks on {gpus} GPU(s): NCCL wants a GPU for each rank; "
            f"use --nproc_per_node={gpus}, or --backend gloo to share, or --device cpu"
        )
    return torch.device("cuda", launch.local_rank % gpus)


def _choose_backend(backend: str, device: torch.device) -> str:
    if backend != "auto":
        return backend
    return "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


def _join(launch: Launch, backend: str, timeout_s: float, device: torch.device) -> None:
    timeout = timedelta(seconds=timeout_s)
    device_id = device if backend == "nccl" else None
    if launch.master_addr is None:  # alone: no port, no network
        alone = dist.HashStore()
        dist.init_process_group(
            backend, store=alone, rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
        return
    os.environ["MASTER_ADDR"] = launch.master_addr
    os.environ["MASTER_PORT"] = str(launch.master_port)
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=device_id,
        )
    except (dist.DistError, socket.gaierror) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{launch.master_addr}:{launch.master_port} within {timeout_s:g} s: {first_line}"
        ) from error


def _leave(backend: str, failed: bool) -> None:
    """Destroy the group; after a failure NCCL's is aborted, since its peers may never answer."""
    if not dist.is_initialized():
        return
    if failed and backend == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def spawn(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    device: str = "cpu",
) -> list[Any]:
    """Run `function(runtime, *args)` on `world_size` processes here; their results, by rank.

    For tests and graders: no torchrun, and torch is imported once (a fork server). `function` and
    its arguments must be picklable, so a function at the top of a module.

    Raises `RunError` with a rank's traceback when it fails, or when `timeout_s` has passed; the
    other ranks are killed then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // world_size)
    ranks, readers = [], []
    for rank in range(world_size):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent's store: rank 0 opens no port
        }
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(writer, env, threads, timeout_s, device, function, args),
            daemon=True,
        )
        process.start()
        writer.close()
        ranks.append(process)
        readers.append(reader)
    try:
        return _collect(readers, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()


def _run_rank(
    writer: Connection,
    env: dict[str, str],
    threads: int,
    timeout_s: float,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(env)
    torch.set_num_threads(threads)
    try:
        backend = "gloo" if device == "cpu" else "auto"
        with distributed(backend=backend, timeout_s=timeout_s, device=device) as runtime:
            outcome = (True, function(runtime, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # Plain pickle: torch's own would send file descriptors, which this process soon closes.
    writer.send_bytes(pickle.dumps(outcome))
    writer.close()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(readers):
        missing = [reader for reader in readers if reader not in results]
        ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [readers.index(reader) for reader in missing]
            raise RunError(f"ranks {late} did not finish in time and were killed")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.index(reader)
            try:
                succeeded, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RunError(f"rank {rank} died without a result") from None
            if not succeeded:
                raise RunError(f"rank {rank} failed:\n{value}")
            results[reader] = value
    return [results[reader] for reader in readers]
