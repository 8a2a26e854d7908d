"""Who am I in this job: rank, world size, device, back end, and a process group that ends cleanly.

The same script runs alone (`python x.py`), under torchrun, and under Slurm (`srun python x.py`).
"""

import argparse
import os
import random
import re
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distlab.errors import RunError, UsageError
from distlab.launch import Launch, detect_launch

DEFAULT_TIMEOUT_S = 60.0
has_joined = False  # a process group, in this process: see `distlab.script.exit`
LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (?:closed|reset)|[Tt]imed? ?out|pair closure|broken pipe"
)


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

    Raises `UsageError` when there are more ranks than GPUs for NCCL, or no GPU where one was asked,
    and `RunError`, in one line that names the script's own, when a collective fails because a rank
    is gone or did not come in time.
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
    global has_joined
    has_joined = True
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
    started = time.monotonic()
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=device_id,
        )
    except (RuntimeError, socket.gaierror) as error:  # the store's and gloo's are RuntimeErrors
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        waited = time.monotonic() - started  # gloo's may be five timeouts, for a silent address
        raise RunError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at "
            f"{launch.master_addr}:{launch.master_port} in {waited:.1f} s "
            f"(timeout {timeout_s:g} s): {first_line}"
        ) from error


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
    torch_itself = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(torch_itself)]
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    said = re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0])
    return (
        f"rank {runtime.rank} of {runtime.world_size} lost the others at {where}: a rank is gone, "
        f"or did not come within {timeout_s:g} s ({said})"
    )
