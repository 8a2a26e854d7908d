"""KV blocks on their way from one engine to another: what fits whom, and what goes when.

    runner = ExportingRunner(config, hand_over)     # of the engine that computes the prompts
    runner.export("request-1", first=0)             # from now on its blocks are handed over
    mover.send(1, "request-1", 0, blocks)           # there: `cache.read`'s
    mover.expect(0, "request-1", 0, 8)              # here: they come in `mover.arrivals()`

A prompt that is computed in chunks is sent in pieces, each while the next chunk is computed, so
that only the last piece makes somebody wait, as long as the link is faster than the prefill.
Source: Patel et al., "Splitwise" (ISCA 2024), section IV; Zhong et al., "DistServe" (OSDI 2024).
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing import Pipe
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distlab.errors import UsageError
from paged_engine.attention import PagedCache
from paged_engine.batch import Batch
from paged_engine.config import EngineConfig
from paged_engine.loading import DTYPES
from paged_engine.runner import ModelRunner

# Of each load its pieces in order: ready at, bytes, and 1 for the last one of a prompt.
Turns = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Layout:
    """What a block holds: two engines whose blocks differ cannot read each other's."""

    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, cache: PagedCache) -> "Layout":
        sizes: dict[str, Any] = {
            field.name: getattr(cache.shape, field.name, "") for field in fields(cls)
        }
        return cls(**{**sizes, "dtype": str(cache.data.dtype).removeprefix("torch.")})

    def shape(self, blocks: int) -> tuple[int, ...]:
        return (blocks, self.layers, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        numbers = 2 * self.layers * self.kv_heads * self.block_size * self.head_dim
        return numbers * DTYPES[self.dtype].itemsize

    def refuse_other(self, theirs: "Layout") -> None:
        """Raise `UsageError` where the receiver's blocks are others."""
        for name, own in asdict(self).items():
            if (other := getattr(theirs, name)) != own:
                raise UsageError(
                    f"the KV transfer is refused: the prefill engine's {name} is {own}, the decode "
                    f"engine's {other}; give both the same --{name.replace('_', '-')}"
                )


class ExportingRunner(ModelRunner):
    """Hands over the blocks of chosen requests as soon as a step has filled them.

    `hand_over(name, first, contents)` gets blocks from place `first` of the block table on, with
    the last one of a prompt even if it is not full. They are copies, so that the step after may
    give the blocks to others.
    """

    def __init__(self, config: EngineConfig, hand_over: Callable[[str, int, Tensor], None]) -> None:
        super().__init__(config)
        self._hand_over = hand_over
        self._next: dict[str, int] = {}  # request -> the first block that has not gone

    def export(self, name: str, first: int) -> None:
        """Hand over the blocks of this request from place `first` on; the end is seen here."""
        self._next[name] = first

    def forget(self, name: str) -> None:
        self._next.pop(name, None)

    def execute(self, batch: Batch) -> Tensor:
        logits = super().execute(batch)
        size = self.settings.block_size
        for chunk, sequence in zip(batch.chunks, batch.sequences, strict=True):
            name = sequence.request.request_id
            first = self._next.get(name)
            if first is None:
                continue
            filled = -(-chunk.end // size) if chunk.samples else chunk.end // size
            if filled > first:
                self._hand_over(name, first, self.cache.read(chunk.block_table[first:filled]))
                self._next[name] = filled
            if chunk.samples:
                del self._next[name]
        return logits


@dataclass(frozen=True)
class Arrival:
    """Blocks from place `first` of a request's block table on; None: the peer is lost."""

    name: str
    first: int
    contents: Tensor | None


class Mover:
    """Sends and receives pieces over torch.distributed, in order, a thread for each peer and way.

    Both sides name the pieces of a pair in the same order. What came, or cannot come, is in
    `arrivals`, and `wake` becomes readable then, for `multiprocessing.connection.wait`. The process
    group's timeout bounds each piece.
    """

    def __init__(self, layout: Layout, device: torch.device, backend: str) -> None:
        self.layout = layout
        self._where = device if backend == "nccl" else torch.device("cpu")
        self.wake, self._bell = Pipe(duplex=False)
        self._came: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._lines: dict[tuple[str, int], queue.SimpleQueue[Any]] = {}

    def send(self, peer: int, name: str, first: int, contents: Tensor) -> None:
        self._line("send", peer).put((name, first, contents))

    def expect(self, peer: int, name: str, first: int, count: int) -> None:
        self._line("receive", peer).put((name, first, count))

    def arrivals(self) -> Iterator[Arrival]:
        """What came since the last call; and what could not be sent or received, without blocks."""
        while self.wake.poll():
            self.wake.recv_bytes()
        while not self._came.empty():
            yield self._came.get()

    def _line(self, way: str, peer: int) -> "queue.SimpleQueue[Any]":
        if (way, peer) not in self._lines:
            line = self._lines[way, peer] = queue.SimpleQueue()
            work = self._send if way == "send" else self._receive
            threading.Thread(target=self._serve, args=(line, work, peer), daemon=True).start()
        return self._lines[way, peer]

    def _serve(
        self,
        line: "queue.SimpleQueue[Any]",
        work: Callable[[int, str, int, Any], Tensor | None],
        peer: int,
    ) -> None:
        is_lost = False
        while True:
            name, first, what = line.get()
            try:
                came = None if is_lost else work(peer, name, first, what)
            except RuntimeError:  # gloo's and NCCL's: the peer is gone, or did not come in time
                came, is_lost = None, True
            if came is not None or is_lost:
                self._came.put(Arrival(name, first, came))
                self._bell.send_bytes(b"")

    def _send(self, peer: int, name: str, first: int, contents: Tensor) -> None:
        dist.send(contents.to(self._where), peer)

    def _receive(self, peer: int, name: str, first: int, count: int) -> Tensor:
        contents = torch.empty(
            self.layout.shape(count), dtype=DTYPES[self.layout.dtype], device=self._where
        )
        dist.recv(contents, peer)
        return contents


def delivered(pieces: Iterable[tuple[float, float]], bytes_per_s: float) -> list[float]:
    """When each piece is there, of pieces (ready at, bytes) in the order of one link's queue.

    t[i] = max(ready[i], t[i - 1]) + bytes[i] / rate: Lindley's recursion on the link.
    """
    there, times = 0.0, []
    for ready, size in pieces:
        there = max(ready, there) + size / bytes_per_s
        times.append(there)
    return times


def late(turns: Turns, bytes_per_s: float) -> float:
    """Seconds from a prompt's last piece being computed to its being delivered, in the mean."""
    lates = []
    for turn in turns:
        there = delivered([(ready, size) for ready, size, _ in turn], bytes_per_s)
        lates += [at - ready for at, (ready, _, last) in zip(there, turn, strict=True) if last]
    return float(np.mean(lates))


def break_even(turns: Turns, saved_s: float, least: float = 1e3) -> float:
    """The rate in bytes/s at which pieces are as late as disaggregation saves; by bisection."""
    low, high = least, 1e12
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if late(turns, middle) > saved_s else (low, middle)
    return high
