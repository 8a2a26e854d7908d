"""Ranks as processes of this machine, for tests and graders: torch is imported once for all."""

import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

from distlab.errors import RunError
from distlab.runtime import DEFAULT_TIMEOUT_S, distributed

# Imported once for all ranks. torch's second and third are what the first step of an optimizer, of
# DDP or of DTensor imports, in every process anew: as long as torch itself.
PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed.tensor",
    "distlab.data", "distlab.model", "distlab.run", "distlab.runtime", "distlab.script",
]  # fmt: skip
BLAME_S = 0.5  # after one rank's failure, how long another may take to tell of an earlier one


def fork_context() -> ForkServerContext:
    """Where processes start that are forked from one which has imported torch and distlab.

    A Python process has one such server, which imports what the first to start it asked for: so
    all should ask for the same, by this function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def spawn(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    device: str = "cpu",
) -> list[Any]:
    """Run `function(runtime, *args)` on `world_size` processes here; their results, by rank.

    No torchrun is needed. `function` and its arguments must be picklable, so a function at the top
    of a module. The ranks share the threads that torch has in this process.

    Raises `RunError` with a rank's traceback when it fails, or when `timeout_s` has passed; the
    other ranks are killed then.
    """
    context = fork_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // world_size)
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
        patience = time.monotonic() + 0.5
        for process in ranks:
            process.join(timeout=max(0.0, patience - time.monotonic()))
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(env)
    torch.set_num_threads(threads)
    failed_at = None
    try:
        backend = "gloo" if device == "cpu" else "auto"
        with distributed(backend=backend, timeout_s=timeout_s, device=device) as runtime:
            try:
                result = function(runtime, *args)
            except BaseException:
                failed_at = time.monotonic()  # before the group is left, which makes others fail
                raise
        # Plain pickle: torch's own would send file descriptors, which this process soon closes.
        outcome = pickle.dumps((None, result))
    except BaseException:
        outcome = pickle.dumps((failed_at or time.monotonic(), traceback.format_exc()))
    writer.send_bytes(outcome)
    writer.close()


def _end_with_parent() -> None:
    """End this rank when the process that asked for it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    """The ranks' results, or a `RunError` about the rank that failed first."""
    results: dict[int, Any] = {}
    failures: dict[int, tuple[float, str]] = {}
    while missing := [r for r in range(len(readers)) if r not in results and r not in failures]:
        patience = BLAME_S if failures else deadline - time.monotonic()
        ready = wait([readers[rank] for rank in missing], timeout=max(0.0, patience))
        if not ready:
            break
        for rank in [rank for rank in missing if readers[rank] in ready]:
            try:
                failed_at, value = pickle.loads(readers[rank].recv_bytes())
            except EOFError:  # killed, so what the others say of it is a consequence
                failed_at, value = 0.0, None
            if failed_at is None:
                results[rank] = value
            else:
                told = "died without a result" if value is None else f"failed:\n{value}"
                failures[rank] = (failed_at, told)
    if failures:
        first = min(failures, key=failures.__getitem__)
        raise RunError(f"rank {first} {failures[first][1]}")
    if missing:
        raise RunError(f"ranks {missing} did not finish in time and were killed")
    return [results[rank] for rank in range(len(readers))]
