"""A router with its workers: as processes of this machine, or as the ranks of a job.

Rank 0 of a job is the router, and makes no engine; the others are the workers 0, 1, and so on.
"""

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Listener
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist

from distlab.errors import RunError, UsageError
from distlab.hardware import has_cuda
from distlab.launch import detect_launch
from distlab.runtime import distributed
from distlab.spawning import fork_context
from paged_engine.config import EngineConfig
from radix.disaggregated import Router, work

SILENT_S = 10.0  # a worker that says nothing for so long is taken for dead
GOODBYE_S = 5.0


@dataclass
class Fleet:
    """A router, and the processes of its workers where they are of this machine."""

    router: Router
    processes: Sequence[BaseProcess] = ()

    def kill(self, worker: int) -> None:
        """End a worker at once, as a crash would (SIGKILL)."""
        self.processes[worker].kill()


@contextmanager
def local_fleet(
    configs: Sequence[EngineConfig], timeout_s: float, backend: str = "auto"
) -> Iterator[Fleet]:
    """A worker process here for each configuration, each with its share of this machine.

    Raises `RunError` when a worker does not come within `timeout_s`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fork_context()
    threads = max(1, torch.get_num_threads() // len(configs))
    gpus = torch.cuda.device_count() if has_cuda() else 0
    processes = []
    with Listener(("127.0.0.1", 0)) as listener:
        try:
            for rank, config in enumerate(configs):
                env = _variables(rank, len(configs), "127.0.0.1", store.port)
                if gpus:
                    env["CUDA_VISIBLE_DEVICES"] = str(rank % gpus)
                chosen = "gloo" if gpus < len(configs) else backend
                told = (env, threads, config, timeout_s, chosen)
                processes.append(context.Process(target=_worker, args=told, daemon=True))
                processes[-1].start()
            router = Router(listener, store, len(configs), timeout_s, SILENT_S)
            yield Fleet(router, processes)
            router.close()
            for process in processes:
                process.join(GOODBYE_S)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


@contextmanager
def fleet_of_ranks(
    config: EngineConfig, timeout_s: float, backend: str, device: str
) -> Iterator[Fleet | None]:
    """The ranks of this job as a fleet: on rank 0 its router, on the others None, once all ended.

    Raises `UsageError` where there are too few ranks.
    """
    launch = detect_launch()
    workers = launch.world_size - 1
    if workers < 2:
        raise UsageError(
            f"{launch.world_size} rank(s): a router and two workers are 3; start 3 or more"
        )
    host, port = launch.master_addr or "127.0.0.1", launch.master_port or 0
    if launch.rank:
        os.environ.update(_variables(launch.rank - 1, workers, host, port))
        _serve(config, timeout_s, backend, device)
        yield None
        return
    limit = timedelta(seconds=timeout_s)
    # torchrun's own store is there already, and then this is one of its clients.
    is_master = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(host, port, is_master=is_master, timeout=limit, wait_for_workers=False)
    with Listener((host, 0)) as listener:
        router = Router(listener, store, workers, timeout_s, SILENT_S)
        yield Fleet(router)
        router.close()


def _variables(rank: int, workers: int, host: str, port: int) -> dict[str, str]:
    """The workers are a job of their own, whose store the router has."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": host,
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _worker(
    env: dict[str, str], threads: int, config: EngineConfig, timeout_s: float, backend: str
) -> None:
    """A process of `local_fleet`. It ends without Python's shutdown: a thread may still wait for a
    dead peer."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(threads)
    try:
        _serve(config, timeout_s, backend, "auto")
    except RunError as error:
        print(f"worker {env['RANK']}: {error}", flush=True)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _serve(config: EngineConfig, timeout_s: float, backend: str, device: str) -> None:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with distributed(backend, timeout_s, device=device) as job:
        limit = timedelta(seconds=timeout_s)
        work(config, dist.TCPStore(host, port, is_master=False, timeout=limit), job)
