"""Four ways to give out cache memory to sequences, and what became of the memory that they had."""

from bisect import insort
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Protocol

from paged_engine.block_manager import BlockManager
from paged_engine.request import Request, Sequence
from paged_engine.sampling_params import SamplingParams


@dataclass
class Job:
    """A request in the replay: `length` tokens are in its cache now, `final` will be."""

    length: int
    final: int


class Allocator(Protocol):
    """Gives out `capacity` tokens of cache, of which `free` are not given out."""

    capacity: int

    @property
    def free(self) -> int: ...

    def admit(self, job: Job, running: int) -> bool:
        """Make room for the job's tokens, if there is any, beside `running` others."""

    def grow(self, job: Job) -> bool:
        """Make room for one token more, if there is any."""

    def held(self, job: Job) -> int:
        """Tokens that the job has room for."""

    def release(self, job: Job) -> None: ...


class BestFit:
    """One contiguous piece for a sequence's final length, from the smallest hole that has room.

    Source: Knuth, "The Art of Computer Programming" volume 1, section 2.5.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.holes = [(0, capacity)]  # (start, size), in order of start, no two touch
        self.pieces: dict[int, tuple[int, int]] = {}

    @property
    def free(self) -> int:
        return sum(size for _, size in self.holes)

    def size_for(self, job: Job) -> int:
        return job.final

    def admit(self, job: Job, running: int) -> bool:
        wanted = self.size_for(job)
        fitting = [(size, start) for start, size in self.holes if size >= wanted]
        if not fitting:
            return False
        size, start = min(fitting)
        self.holes.remove((start, size))
        if size > wanted:
            insort(self.holes, (start + wanted, size - wanted))
        self.pieces[id(job)] = (start, wanted)
        return True

    def grow(self, job: Job) -> bool:
        return True

    def held(self, job: Job) -> int:
        return self.pieces[id(job)][1]

    def release(self, job: Job) -> None:
        insort(self.holes, self.pieces.pop(id(job)))
        merged: list[tuple[int, int]] = []
        for start, size in self.holes:
            if merged and sum(merged[-1]) == start:
                start, size = merged[-1][0], merged.pop()[1] + size
            merged.append((start, size))
        self.holes = merged


class Reserved(BestFit):
    """The same length for everyone: the longest that a request may become."""

    def __init__(self, capacity: int, max_len: int) -> None:
        super().__init__(capacity)
        self.max_len = max_len

    def size_for(self, job: Job) -> int:
        return self.max_len


class Buddy:
    """Pieces of powers of two; a piece and its buddy, free again, become one.

    Source: Knowlton, "A fast storage allocator", CACM 8(10), 1965.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.holes: set[tuple[int, int]] = set()  # (start, size)
        start = 0
        for bit in reversed(range(capacity.bit_length())):  # a capacity of 20 is 16 and 4
            if capacity & (1 << bit):
                self.holes.add((start, 1 << bit))
                start += 1 << bit
        self.pieces: dict[int, tuple[int, int]] = {}

    @property
    def free(self) -> int:
        return sum(size for _, size in self.holes)

    def admit(self, job: Job, running: int) -> bool:
        wanted = 1 << (job.final - 1).bit_length()
        fitting = [(size, start) for start, size in self.holes if size >= wanted]
        if not fitting:
            return False
        size, start = min(fitting)
        self.holes.remove((start, size))
        while size > wanted:
            size //= 2
            self.holes.add((start + size, size))
        self.pieces[id(job)] = (start, size)
        return True

    def grow(self, job: Job) -> bool:
        return True

    def held(self, job: Job) -> int:
        return self.pieces[id(job)][1]

    def release(self, job: Job) -> None:
        start, size = self.pieces.pop(id(job))
        while (start ^ size, size) in self.holes:  # its buddy's start differs in one bit
            self.holes.remove((start ^ size, size))
            start, size = start & ~size, 2 * size
        self.holes.add((start, size))


class Paged:
    """paged_engine's block manager: a block is added when the sequence's last one is full."""

    def __init__(self, capacity: int, block_size: int) -> None:
        self.blocks = BlockManager(capacity // block_size, block_size, prefix_caching=False)
        self.capacity = self.blocks.num_blocks * block_size
        self.sequences: dict[int, Sequence] = {}

    @property
    def free(self) -> int:
        return self.blocks.num_free * self.blocks.block_size

    def admit(self, job: Job, running: int) -> bool:
        """As the engine does: a block must remain for each that runs, to grow into."""
        sequence = Request("", [0] * job.length, SamplingParams()).sequences[0]
        if not self.blocks.fits(sequence, spare=running):
            return False
        self._write(sequence, job.length)
        self.sequences[id(job)] = sequence
        return True

    def grow(self, job: Job) -> bool:
        return self._write(self.sequences[id(job)], job.length + 1)

    def held(self, job: Job) -> int:
        return len(self.sequences[id(job)].block_table) * self.blocks.block_size

    def release(self, job: Job) -> None:
        self.blocks.free(self.sequences.pop(id(job)))

    def _write(self, sequence: Sequence, upto: int) -> bool:
        if self.blocks.allocate(sequence, upto) is None:
            return False
        self.blocks.computed(sequence, upto)
        return True


CONTIGUOUS = [("reserve max", 0), ("buddy, lengths known", 0), ("best fit, lengths known", 0)]


def make_allocator(name: str, block_size: int, capacity: int, max_len: int) -> Allocator:
    """One of the contiguous allocators by its name or, with a block size, paging."""
    if block_size:
        return Paged(capacity, block_size)
    if name == "reserve max":
        return Reserved(capacity, max_len)
    return Buddy(capacity) if name.startswith("buddy") else BestFit(capacity)


@dataclass
class Usage:
    """Sums over the steps that were counted, in tokens of cache."""

    steps: int = 0
    running: int = 0
    live: int = 0  # tokens that are there
    future: int = 0  # room for tokens that will come
    internal: int = 0  # room within what sequences hold that no token will ever use
    worst: int = 0  # the most internal waste of one sequence
    recomputed: int = 0  # tokens of preempted requests

    def observe(self, running: List[Job], allocator: Allocator) -> None:
        self.steps += 1
        self.running += len(running)
        for job in running:
            held = allocator.held(job)
            future = min(job.final, held) - job.length
            self.live += job.length
            self.future += future
            self.internal += held - job.length - future
            self.worst = max(self.worst, held - job.length - future)


@dataclass(frozen=True)
class Row:
    """One allocator's use of `capacity` tokens, and the sequences predicted to fit at once.

    `tokens` are those of all requests, `left` those of the cache that had not come back at the end.
    """

    name: str
    block_size: int  # 0: contiguous
    capacity: int
    usage: Usage
    predicted: float
    tokens: int
    left: int

    @property
    def sequences(self) -> float:
        """That run at once, on average."""
        return self.usage.running / self.usage.steps

    @property
    def waste(self) -> float:
        """Tokens that a sequence holds and that no token will use, on average: internal waste.

        A paged sequence's last block counts as waste as far as it is empty at that moment.
        """
        usage = self.usage
        empty = usage.internal + (usage.future if self.block_size else 0)
        return empty / usage.running

    def percent(self, tokens: float) -> float:
        return 100 * tokens / self.usage.steps / self.capacity

    @property
    def shares(self) -> list[float]:
        """Percent of the cache: tokens, reserved for later, never used, given to nobody."""
        held = [self.usage.live, self.usage.future, self.usage.internal]
        parts = [self.percent(tokens) for tokens in held]
        return [*parts, 100 - sum(parts)]
