"""Lower tiers of the KV cache: blocks that leave the first one are kept, and may come back.

    tiers = [HostTier(64), DiskTier(folder, 256)]
    runner = ModelRunner(config)
    engine = Engine(config, runner, blocks=TieredBlocks(runner, tiers, costs))

A block is known by the hash of all tokens up to its end, so it is the same block wherever it lies.
What the first tier evicts goes to the second, what that one evicts to the third. A prompt whose
prefix the first tier has only in part takes as much of the rest from below as is faster than to
compute it. SGLang calls this HiCache; its transfers overlap with the layers' computing, ours wait.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence as List
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from distlab.files import atomic_write
from paged_engine.block_manager import BlockManager
from paged_engine.request import Sequence
from paged_engine.runner import ModelRunner

CHECKSUM_BYTES = 4


class Tier(Protocol):
    """Somewhere blocks are kept by hash, `room` of them, the longest unused given up first."""

    name: str

    def __contains__(self, digest: bytes) -> bool: ...

    def put(self, digest: bytes, contents: Tensor) -> tuple[bytes, Tensor] | None:
        """Keep a block; what had to go for it, to be put into the tier below."""

    def get(self, digest: bytes) -> Tensor | None:
        """The block, which stays; None where it turns out to be damaged, and is forgotten."""


class HostTier:
    """Blocks in the host's memory."""

    name = "host"

    def __init__(self, room: int) -> None:
        self.room = room
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    def put(self, digest: bytes, contents: Tensor) -> tuple[bytes, Tensor] | None:
        self._blocks[digest] = contents.cpu()
        self._blocks.move_to_end(digest)
        return self._blocks.popitem(last=False) if len(self._blocks) > self.room else None

    def get(self, digest: bytes) -> Tensor | None:
        self._blocks.move_to_end(digest)
        return self._blocks[digest]


class DiskTier:
    """A file for each block in `folder`, with a checksum before the numbers.

    `bytes_per_s`: a limit for reading, in place of a disk or a network that is that slow.
    """

    name = "disk"

    def __init__(self, folder: Path, room: int, bytes_per_s: float | None = None) -> None:
        self.folder, self.room, self.bytes_per_s = folder, room, bytes_per_s
        self.damaged = 0  # files that were not what had been written
        self.refused = 0  # blocks that the disk did not take
        self._known: OrderedDict[bytes, tuple[torch.Size, torch.dtype]] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def path(self, digest: bytes) -> Path:
        return self.folder / f"{digest.hex()}.kv"

    def put(self, digest: bytes, contents: Tensor) -> tuple[bytes, Tensor] | None:
        content = contents.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        try:
            with atomic_write(self.path(digest)) as temporary:
                temporary.write_bytes(_checksum(content) + content)
        except OSError:  # a full disk costs a block's computing, not the engine
            self.refused += 1
            return None
        self._known[digest] = (contents.shape, contents.dtype)
        self._known.move_to_end(digest)
        if len(self._known) > self.room:
            self._forget(next(iter(self._known)))
        return None

    def get(self, digest: bytes) -> Tensor | None:
        started = time.perf_counter()
        shape, dtype = self._known[digest]
        self._known.move_to_end(digest)
        try:
            read = self.path(digest).read_bytes()
        except OSError:  # gone, or unreadable
            read = b""
        if self.bytes_per_s is not None:
            passed = time.perf_counter() - started
            time.sleep(max(0.0, len(read) / self.bytes_per_s - passed))
        checksum, content = read[:CHECKSUM_BYTES], read[CHECKSUM_BYTES:]
        if len(content) != shape.numel() * dtype.itemsize or checksum != _checksum(content):
            self.damaged += 1
            self._forget(digest)
            return None
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    def _forget(self, digest: bytes) -> None:
        del self._known[digest]
        with suppress(OSError):
            self.path(digest).unlink()


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")


@dataclass
class Costs:
    """What it takes to compute a token, and to fetch a block from each tier, in seconds.

    As long as nothing is measured, fetching costs nothing, so that all is fetched.
    """

    token_s: float = 1.0
    block_s: dict[str, float] = field(default_factory=dict)

    def worth_fetching(self, found: List[str], block_size: int) -> int:
        """How many of the blocks, found in these tiers one after the other, to fetch.

        As many as save most: the tokens' time to compute, less the blocks' time to fetch.
        """
        saved = best = 0.0
        count = 0
        for place, tier in enumerate(found, 1):
            saved += block_size * self.token_s - self.block_s.get(tier, 0.0)
            if saved > best:
                best, count = saved, place
        return count


class TieredBlocks(BlockManager):
    """A block manager whose evicted blocks go to lower tiers, and are fetched from there.

    All copies are made at once, while a step is scheduled: between two steps what a block holds is
    what its hash says.
    """

    def __init__(self, runner: ModelRunner, tiers: List[Tier], costs: Costs | None = None) -> None:
        super().__init__(runner.num_blocks, runner.settings.block_size)
        self.cache, self.tiers, self.costs = runner.cache, tiers, costs or Costs()
        self.fetched = {tier.name: 0 for tier in tiers}  # blocks

    def match_prefix(self, sequence: Sequence) -> int:
        super().match_prefix(sequence)
        first = len(sequence.block_table)
        contents = self._fetch(self._prefix_hashes(sequence)[first:])
        if contents:
            blocks = [self._new_block() for _ in contents]
            self.cache.write(blocks, torch.stack(contents))
            sequence.block_table += blocks
            self.computed(sequence, (first + len(blocks)) * self.block_size)
            self.hits += len(blocks) * self.block_size
        return sequence.computed

    def allocate(self, sequence: Sequence, upto: int) -> list[tuple[int, int]] | None:
        copies = super().allocate(sequence, upto)
        if copies:
            self.cache.copy(copies)
        return None if copies is None else []

    def _fetch(self, digests: List[bytes]) -> list[Tensor]:
        """The first of these blocks, as many as are below and worth it."""
        found: list[Tier] = []
        for digest in digests:
            tier = next((tier for tier in self.tiers if digest in tier), None)
            if tier is None:
                break
            found.append(tier)
        count = self.costs.worth_fetching([tier.name for tier in found], self.block_size)
        contents = []
        for digest, tier in zip(digests[:count], found, strict=False):
            one = tier.get(digest)
            if one is None:  # damaged: it and what follows is computed
                break
            contents.append(one)
            self.fetched[tier.name] += 1
        return contents

    def _new_block(self) -> int:
        block = next(iter(self._free))
        if (digest := self._hash[block]) is not None:
            self._put(digest, self.cache.read([block])[0])
        return super()._new_block()

    def _put(self, digest: bytes, contents: Tensor) -> None:
        """Into the first lower tier, what that one gives up into the next, and so on."""
        leaving: tuple[bytes, Tensor] | None = (digest, contents)
        for tier in self.tiers:
            if leaving is None or leaving[0] in tier:
                return
            leaving = tier.put(*leaving)


def drop_from_page_cache(path: Path) -> None:
    """Have the next reading of a file come from its disk, where the system can do that."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
