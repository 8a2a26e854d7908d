"""Who owns which block of the KV cache: block tables, sharing by reference count, prefix caching.

The cache is cut into blocks of `block_size` tokens, so that a sequence needs no contiguous room
and wastes less than one block (Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention", SOSP 2023). Only numbers are kept here; the keys and values are the
model runner's.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from importlib.metadata import entry_points

from distlab.errors import UsageError
from paged_engine.request import Sequence

POLICIES = "paged_engine.prefix_cache"  # the entry points of packages that bring one


def block_policy(name: str) -> "type[BlockManager]":
    """The class of --prefix-cache `name`: this module's own is called hash."""
    if name == "hash":
        return BlockManager
    others = {entry.name: entry for entry in entry_points(group=POLICIES)}
    if name not in others:
        raise UsageError(f"--prefix-cache {name} is unknown; use {' or '.join(['hash', *others])}")
    policy: type[BlockManager] = others[name].load()
    return policy


class BlockManager:
    """Gives blocks to sequences and takes them back; equal prefixes get the same blocks.

    A block is free when no block table holds it. A free block whose contents are known by a hash
    is still found by `match_prefix`, until it is evicted: free blocks are given out in the order
    of `_free`, worthless ones first, then those longest unused (LRU).
    """

    def __init__(self, num_blocks: int, block_size: int = 16, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.queries = 0  # tokens looked up in the prefix cache
        self.hits = 0  # tokens found there
        self.evictions = 0  # cached blocks whose contents were given up for others
        self.owners: dict[Sequence, None] = {}  # an ordered set: the sequences with a block table
        self._references = [0] * num_blocks  # block -> number of block tables that hold it
        self._free = OrderedDict.fromkeys(range(num_blocks))
        self._hash: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, free or not, that `match_prefix` can find."""
        return len(self._block_of)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def fits(self, sequence: Sequence, spare: int = 0) -> bool:
        """Whether all tokens of a sequence without blocks have room, with `spare` blocks left."""
        shared = sum(self._references[block] > 0 for block in self._cached_prefix(sequence))
        needed = self.blocks_for(len(sequence.token_ids)) - shared
        return needed + spare <= self.num_free

    def match_prefix(self, sequence: Sequence) -> int:
        """Begin the block table with the cached blocks of the longest known prefix.

        Returns the number of tokens found, always less than the sequence has: the logits that
        choose the next token come from computing the last one. Whole blocks are found, so none of
        them is written to, and none has to be copied.
        """
        blocks = self._cached_prefix(sequence)
        for block in blocks:
            self._take(block)
        self.owners[sequence] = None
        sequence.block_table = blocks
        sequence.computed = len(blocks) * self.block_size
        if self.prefix_caching:
            self.queries += len(sequence.token_ids)
            self.hits += sequence.computed
        return sequence.computed

    def allocate(self, sequence: Sequence, upto: int) -> list[tuple[int, int]] | None:
        """Give the sequence blocks of its own to write tokens [computed, upto) into.

        Returns the copies (from block, to block) to be made before anything is written, mostly
        none: a block that other sequences hold too is copied on write. Returns None, and changes
        nothing, if too few blocks are free.
        """
        table, references = sequence.block_table, self._references
        first = sequence.computed // self.block_size
        shared = [p for p in range(first, len(table)) if references[table[p]] > 1]
        missing = self.blocks_for(upto) - len(table)
        if not shared and missing <= 0:
            return []  # as in most decodes
        if len(shared) + max(missing, 0) > self.num_free:
            return None
        self.owners[sequence] = None
        copies = []
        for position in shared:
            copies.append((table[position], self._new_block()))
            self._release(table[position])
            table[position] = copies[-1][1]
        table.extend(self._new_block() for _ in range(missing))
        return copies

    def computed(self, sequence: Sequence, upto: int) -> None:
        """Note that the first `upto` tokens are in the cache; full blocks can now be found."""
        first = sequence.computed // self.block_size
        for position, digest in enumerate(self.completed(sequence, upto), first):
            block = sequence.block_table[position]
            if self._hash[block] is None and digest not in self._block_of:  # else: it has a twin
                self._hash[block] = digest
                self._block_of[digest] = block
        sequence.computed = upto

    def completed(self, sequence: Sequence, upto: int) -> list[bytes]:
        """The hashes of the blocks that are full once tokens [computed, upto) are computed."""
        first, full = sequence.computed // self.block_size, upto // self.block_size
        if first == full or not self.prefix_caching:
            return []
        return self._hashes(sequence, full)[first:full]

    def first_missing(self, sequence: Sequence) -> bytes | None:
        """The hash of the first block that `match_prefix` would look for and not find."""
        hashes = self._prefix_hashes(sequence)
        found = len(self._cached_prefix(sequence))
        return hashes[found] if found < len(hashes) else None

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share all blocks of the parent; who first writes into one gets a copy."""
        for block in parent.block_table:
            self._take(block)
        self.owners[child] = None
        child.block_table = list(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.computed = parent.computed

    def free(self, sequence: Sequence) -> None:
        """Take the blocks back, the last first: a prefix is worth more than what follows it."""
        for block in reversed(sequence.block_table):
            self._release(block)
        self.owners.pop(sequence, None)
        sequence.block_table = []
        sequence.computed = 0

    def check(self) -> None:
        """Assert the invariants: slow, for tests."""
        tables = [sequence.block_table for sequence in self.owners]
        held = Counter(block for table in tables for block in table)
        assert all(len(set(table)) == len(table) for table in tables), "a block twice in one table"
        assert self._references == [held[block] for block in range(self.num_blocks)]
        assert self._free.keys().isdisjoint(held), "a block is both free and held"
        assert self.num_free + len(held) == self.num_blocks, "a block is lost"
        assert self._block_of == {h: block for block, h in enumerate(self._hash) if h is not None}
        worth = [self._hash[block] is not None for block in self._free]
        assert worth == sorted(worth), "a cached block would be evicted before a worthless one"

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        blocks = []
        for digest in self._prefix_hashes(sequence):
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _prefix_hashes(self, sequence: Sequence) -> list[bytes]:
        """Of the full blocks that may be taken from the cache: one token is left to compute."""
        if not self.prefix_caching:
            return []
        return self._hashes(sequence, (len(sequence.token_ids) - 1) // self.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The hashes of the first `count` blocks, each of the block's tokens and the hash before.

        Thus equal hashes mean equal prefixes, since nobody finds two inputs of one SHA-256.
        """
        known, size = sequence.block_hashes, self.block_size
        for position in range(len(known), count):
            tokens = array("q", sequence.token_ids[position * size : (position + 1) * size])
            before = known[-1] if known else b""
            known.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return known[:count]

    def _new_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._hash[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash[block] = None
            self.evictions += 1
        self._references[block] = 1
        return block

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if self._hash[block] is None:
                self._free.move_to_end(block, last=False)
