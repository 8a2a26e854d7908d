"""Which worker has which prefix: a trie of blocks, held as a table from a block to its workers.

A block's key is a hash of its tokens and of the key before it, so that equal keys mean equal
prefixes: the trie needs no nodes, and the walk along a prompt is a look-up for each block, for all
workers at once (a bit each). SGLang's router keeps a radix tree of text instead, which finds where
a prompt leaves a path to the character, and pays for each with a walk and a split.

For a worker that publishes KV events the index is a mirror of its cache: what was stored, until it
is removed. For others it is a guess: what was sent there, at most `guess_blocks`, the longest
unused given up first, as the worker will have done.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

Holder = TypeVar("Holder")
EXPECTED_S = 0.25  # after an answer: until then its events have come
ROOT = 0


def block_keys(tokens: Sequence[int], block_size: int) -> list[int]:
    """The keys of the whole blocks of `tokens`."""
    keys, key = [], ROOT
    for at in range(0, len(tokens) - block_size + 1, block_size):
        key = hash((key, *tokens[at : at + block_size]))
        keys.append(key)
    return keys


def text_keys(text: bytes, block_size: int) -> list[int]:
    """The same where no tokenizer is at hand: `block_size` bytes are a block."""
    keys, key = [], ROOT
    for at in range(0, len(text) - block_size + 1, block_size):
        key = hash((key, text[at : at + block_size]))
        keys.append(key)
    return keys


class Mirror:
    """What is known of one worker's cache."""

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.exact = False  # it publishes events
        self.names: dict[Any, int] = {}  # the engine's name of a block: its key
        self.stored: dict[int, int] = {}  # key: how many blocks of the worker have it
        self.guessed: OrderedDict[int, None] = OrderedDict()
        self.expected: dict[int, int] = {}  # key: how many requests will store it


class PrefixIndex(Generic[Holder]):
    """`match` tells how many of a prompt's first blocks each worker has."""

    def __init__(self, guess_blocks: int = 4096) -> None:
        self.guess_blocks = guess_blocks
        self._holders: dict[int, int] = {}  # key: the bits of its workers
        self._mirrors: dict[Holder, Mirror] = {}
        self._leaving: deque[tuple[float, Holder, Sequence[int]]] = deque()

    def __len__(self) -> int:
        return len(self._holders)

    def mirror(self, worker: Holder) -> Mirror:
        if worker not in self._mirrors:
            used = {mirror.bit for mirror in self._mirrors.values()}
            bit = next(1 << i for i in range(len(used) + 1) if 1 << i not in used)
            self._mirrors[worker] = Mirror(bit)
        return self._mirrors[worker]

    def match(self, keys: Sequence[int], workers: Sequence[Holder]) -> list[int]:
        """For each worker, the blocks at the beginning of `keys` that it has."""
        bits = [self.mirror(worker).bit for worker in workers]
        depths = dict.fromkeys(bits, 0)
        holders, left = self._holders, sum(bits)
        for depth, key in enumerate(keys):
            still = left & holders.get(key, 0)
            if still != left:
                gone = left & ~still
                for bit in bits:
                    if gone & bit:
                        depths[bit] = depth
                left = still
                if not left:
                    break
        for bit in bits:
            if left & bit:
                depths[bit] = len(keys)
        return [depths[bit] for bit in bits]

    def copies(self, key: int) -> int:
        """How many workers have the block."""
        return self._holders.get(key, 0).bit_count()

    # ---- what will be stored, by a request that was sent there

    def expect(self, worker: Holder, keys: Sequence[int]) -> None:
        mirror = self.mirror(worker)
        if not mirror.exact:
            self._guess(mirror, keys)
            return
        for key in keys:
            mirror.expected[key] = mirror.expected.get(key, 0) + 1
            self._add(mirror, key)

    def arrived(self, worker: Holder, keys: Sequence[int], now: float) -> None:
        """The request has been answered: soon the events alone say what is there."""
        if self.mirror(worker).exact:
            self._leaving.append((now + EXPECTED_S, worker, keys))

    def settle(self, now: float) -> None:
        while self._leaving and self._leaving[0][0] < now:
            _, worker, keys = self._leaving.popleft()
            if (mirror := self._mirrors.get(worker)) is None:
                continue
            for key in keys:
                count = mirror.expected.get(key, 0) - 1
                if count > 0:
                    mirror.expected[key] = count
                else:
                    mirror.expected.pop(key, None)
                    self._check(mirror, key)

    def _guess(self, mirror: Mirror, keys: Sequence[int]) -> None:
        guessed = mirror.guessed
        for key in reversed(keys):  # so that the end of a prefix goes before its beginning
            guessed[key] = None
            guessed.move_to_end(key)
            self._add(mirror, key)
        while len(guessed) > self.guess_blocks:
            key, _ = guessed.popitem(last=False)
            self._check(mirror, key)

    # ---- what the worker says

    def stored(
        self, worker: Holder, names: Sequence[Any], parent: Any, tokens: Sequence[int], size: int
    ) -> None:
        """The blocks called `names` hold `tokens`, after the block `parent` (None: at the top)."""
        mirror = self.mirror(worker)
        key = ROOT if parent is None else mirror.names.get(parent)
        if key is None:  # what is before it was stored before we listened: that is only guessed
            return
        mirror.exact = True
        for i, name in enumerate(names):
            key = hash((key, *tokens[i * size : (i + 1) * size]))
            if name not in mirror.names:
                mirror.names[name] = key
                mirror.stored[key] = mirror.stored.get(key, 0) + 1
                self._add(mirror, key)
                if mirror.guessed:  # what is stored takes the place of what was, before we listened
                    self._check(mirror, mirror.guessed.popitem(last=False)[0])

    def removed(self, worker: Holder, names: Sequence[Any]) -> None:
        mirror = self.mirror(worker)
        for name in names:
            if (key := mirror.names.pop(name, None)) is not None:
                mirror.guessed.pop(key, None)
                mirror.stored[key] -= 1
                if not mirror.stored[key]:
                    del mirror.stored[key]
                    self._check(mirror, key)

    def clear(self, worker: Holder) -> None:
        """Nothing is there any more, or nothing is known."""
        mirror = self.mirror(worker)
        keys = {*mirror.stored, *mirror.guessed, *mirror.expected}
        mirror.names, mirror.stored = {}, {}
        mirror.guessed.clear()
        mirror.expected.clear()
        for key in keys:
            self._check(mirror, key)

    def forget(self, worker: Holder) -> None:
        """The worker is no more; its bit may be another's."""
        self.clear(worker)
        del self._mirrors[worker]

    def _add(self, mirror: Mirror, key: int) -> None:
        self._holders[key] = self._holders.get(key, 0) | mirror.bit

    def _check(self, mirror: Mirror, key: int) -> None:
        """Take the worker's bit away if nothing says any more that it has the block."""
        if key in mirror.stored or key in mirror.expected or key in mirror.guessed:
            return
        left = self._holders.get(key, 0) & ~mirror.bit
        if left:
            self._holders[key] = left
        else:
            self._holders.pop(key, None)
