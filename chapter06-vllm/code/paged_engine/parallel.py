"""Tensor parallelism: every layer's heads and columns shared by several processes of this machine.

Each process holds whole heads and a slice of the feed-forward columns, computes a partial output,
and the outputs are summed: two all-reduces per layer (Shoeybi et al. 2019, "Megatron-LM", section
3). The driver is process 0. It sends each step, as plain integers, to the workers through a socket
of its own, so that a worker that waits for work can tell from the closed socket that the driver is
gone; and it waits for no collective longer than a limit.
"""

import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distlab.errors import RunError, UsageError
from paged_engine.batch import Batch
from paged_engine.config import EngineConfig, dedicate_process
from paged_engine.loading import Part
from paged_engine.paged_model import Sharing
from paged_engine.shard import Shard

START_S, STEP_S, END_S = 300.0, 60.0, 5.0  # limits: to load the model, of a collective, to leave


class TensorParallel:
    """The driver's side: starts the workers, sends them each batch, and does its own part.

    In `config` all is decided, as `ModelRunner` does it; `limit_s` bounds every wait for another
    process. Raises `RunError` when a worker is gone, or does not answer within it.
    """

    def __init__(self, config: EngineConfig, limit_s: float = STEP_S) -> None:
        size = config.tensor_parallel
        if dist.is_initialized():
            raise UsageError(
                f"--tensor-parallel {size} makes a process group of its own, and this process is "
                "in one already; start the engine in a process that torchrun did not start"
            )
        self.limit_s, self.closed = limit_s, False
        self.own_threads = torch.get_num_threads()
        threads = max(1, self.own_threads // size)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = [config.to_json(), str(self.store.port), str(limit_s), str(threads)]
        self.workers = [_Worker(rank, place) for rank in range(1, size)]
        try:
            torch.set_num_threads(threads)
            self.shard = Shard(config, Part(0, size), Sharing(reduce, gather, is_shared=True))
            self._wait_for_workers(size)
            _join(self.store, self.shard.device, 0, size, limit_s)
        except BaseException:
            self.close()
            raise

    def allocate(self, num_blocks: int) -> None:
        """Every process makes its part of the cache."""
        self._send(struct.pack("q", num_blocks))
        self.shard.allocate(num_blocks)

    def run(self, batch: Batch) -> Tensor:
        """As `Shard.run`, with all processes."""
        if self.closed:
            raise RunError("a process of this tensor-parallel model has failed; start it again")
        try:
            self._send(batch.to_bytes())
            return self.shard.run(batch)
        except (RuntimeError, OSError) as error:  # the back ends know no better type
            told = self._obituary() or str(error).splitlines()[0]
            self.close(failed=True)
            raise RunError(f"a step of the tensor-parallel model failed: {told}") from error

    def close(self, failed: bool = False) -> None:
        """End the workers, by force if they do not leave by themselves; may be called again."""
        if self.closed:
            return
        self.closed = True
        for worker in self.workers:
            worker.end(patience_s=0.0 if failed else END_S)
        torch.set_num_threads(self.own_threads)
        if dist.is_initialized():
            if failed and dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def _send(self, message: bytes) -> None:
        for worker in self.workers:
            worker.send(message, self.limit_s)

    def _wait_for_workers(self, size: int) -> None:
        """Until all have loaded their weights: from then on they answer within `limit_s`."""
        deadline = time.monotonic() + START_S
        names = [f"loaded/{rank}" for rank in range(1, size)]
        while not self.store.check(names):
            if gone := self._obituary():
                raise RunError(f"tensor parallelism could not start: {gone}")
            if time.monotonic() > deadline:
                raise RunError(f"a tensor-parallel process did not load within {START_S:g} s")
            time.sleep(0.02)

    def _obituary(self) -> str:
        """Who has ended, and how; after a lost connection it may take the kernel a moment."""
        for _ in range(10):
            ended = [worker for worker in self.workers if worker.process.poll() is not None]
            if ended:
                first = ended[0]
                return f"process {first.rank} ended with status {first.process.returncode}"
            if not dist.is_initialized():
                break
            time.sleep(0.02)
        return ""


class _Worker:
    """A worker process as its driver sees it."""

    def __init__(self, rank: int, place: list[str]) -> None:
        self.rank = rank
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "paged_engine.parallel", str(theirs.fileno()), str(rank)]
        with theirs:
            self.process = subprocess.Popen(
                [*command, *place],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the driver, whose end the worker sees
            )

    def send(self, message: bytes, limit_s: float) -> None:
        self.socket.settimeout(limit_s)
        self.socket.sendall(struct.pack("q", len(message)) + message)

    def end(self, patience_s: float) -> None:
        self.socket.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        self.process.kill()
        self.process.wait()


def reduce(partial: Tensor) -> Tensor:
    """The sum of all processes' `partial`, in its place."""
    dist.all_reduce(partial)
    return partial


def gather(part: Tensor) -> Tensor:
    """The driver's and the workers' columns side by side [rows, vocab], for the driver alone."""
    if dist.get_rank() > 0:
        dist.gather(part, dst=0)
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.gather(part, parts, dst=0)
    return torch.cat(parts, dim=-1)


def work(descriptor: int, rank: int, config: EngineConfig, port: int, limit_s: float) -> None:
    """A worker's life: load, join, and execute what comes until the driver closes the socket."""
    size = config.tensor_parallel
    with socket.socket(fileno=descriptor) as driver:
        store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=limit_s))
        shard = Shard(config, Part(rank, size), Sharing(reduce, gather, is_shared=True))
        store.set(f"loaded/{rank}", "")
        _join(store, shard.device, rank, size, START_S)
        if message := _receive(driver):
            shard.allocate(*struct.unpack("q", message))
        dedicate_process()
        while message := _receive(driver):
            shard.run(Batch.from_bytes(message))


def _join(store: dist.TCPStore, device: torch.device, rank: int, size: int, limit_s: float) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=limit_s),
        device_id=device if device.type == "cuda" else None,
    )


def _receive(driver: socket.socket) -> bytes:
    """The next message; empty when the driver has closed its end, or is gone."""
    header = _read(driver, 8)
    return _read(driver, *struct.unpack("q", header)) if header else b""


def _read(driver: socket.socket, size: int) -> bytes:
    parts = []
    while size > 0:
        part = driver.recv(size)
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main() -> None:
    descriptor, rank, config, port, limit_s, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        place = EngineConfig.from_json(config), int(port), float(limit_s)
        work(int(descriptor), int(rank), *place)
    except (RunError, UsageError, RuntimeError, OSError) as error:
        print(f"tensor-parallel process {rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        os._exit(1)  # the process group cannot be left: its other members may never answer
    os._exit(0)


if __name__ == "__main__":
    main()
