"""The radix tree as the engine's second cache policy: `--prefix-cache radix`.

A page of the tree is a block of the engine's cache, and its value that block's number. What the
policy "hash" keeps in a dictionary of hashes and a queue of free blocks, the tree keeps in its
nodes: a block that it holds is found by its tokens, and given up with the leaf longest unused. With
`--block-size 1` a prefix is matched at any token, as in SGLang.
"""

from paged_engine.block_manager import BlockManager
from paged_engine.request import Sequence
from radix.tree import Node, RadixTree


class RadixBlocks(BlockManager):
    """A block is free, or some sequence's own, or in the tree, where sequences lock what they use.

    A prompt enters the tree as it is computed, an answer when it ends.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, prefix_caching: bool = True) -> None:
        super().__init__(num_blocks, block_size, prefix_caching)
        self.tree = RadixTree(block_size)
        self._locked: dict[Sequence, Node] = {}
        self._forks: list[tuple[Sequence, Sequence]] = []  # of a prompt not yet in the tree
        self._in_tree = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free) + self.tree.evictable

    @property
    def num_cached(self) -> int:
        return self.tree.evictable + self.tree.protected

    def fits(self, sequence: Sequence, spare: int = 0) -> bool:
        values, node = self._match(sequence)
        shared = sum(len(each.values) for each in node.path() if each.locks)
        assert shared <= len(values)
        return self.blocks_for(len(sequence.token_ids)) - shared + spare <= self.num_free

    def match_prefix(self, sequence: Sequence) -> int:
        values, node = self._match(sequence)
        self._lock(sequence, node)
        for block in values:
            self._references[block] += 1
        self.owners[sequence] = None
        sequence.block_table = values
        sequence.computed = len(values) * self.block_size
        if self.prefix_caching:
            self.queries += len(sequence.token_ids)
            self.hits += sequence.computed
        return sequence.computed

    def computed(self, sequence: Sequence, upto: int) -> None:
        is_prompt = sequence.computed < sequence.prompt_length
        sequence.computed = upto
        if is_prompt:
            self._insert(sequence)
            for parent, child in self._forks:
                if parent is sequence and child in self.owners:
                    self._insert(child)
            self._forks = [pair for pair in self._forks if pair[0] is not sequence]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        super().fork(parent, child)
        if parent in self._locked:
            self._lock(child, self._locked[parent])
        self._forks.append((parent, child))

    def free(self, sequence: Sequence) -> None:
        self._insert(sequence)
        self._forks = [pair for pair in self._forks if sequence not in pair]
        super().free(sequence)
        if sequence in self._locked:
            self.tree.unlock(self._locked.pop(sequence))

    def first_missing(self, sequence: Sequence) -> bytes | None:
        hashes = self._prefix_hashes(sequence)
        found = len(self._match(sequence)[0])
        return hashes[found] if found < len(hashes) else None

    def check(self) -> None:
        held = [block for node in self.tree.nodes() for block in node.values]
        assert len(held) == len(set(held)) == self.num_cached, "a block twice in the tree"
        assert self._in_tree == [block in set(held) for block in range(self.num_blocks)]
        used = {block for sequence in self.owners for block in sequence.block_table}
        assert self._free.keys().isdisjoint(used | set(held)), "a block is both free and held"
        assert len(self._free) + len(used | set(held)) == self.num_blocks, "a block is lost"
        locked = {block for node in self.tree.nodes() if node.locks for block in node.values}
        assert used & set(held) <= locked, "a block that a sequence uses may be evicted"

    def _match(self, sequence: Sequence) -> tuple[list[int], Node]:
        if not self.prefix_caching:
            return [], self.tree.root
        return self.tree.match(sequence.token_ids[: len(sequence.token_ids) - 1])

    def _insert(self, sequence: Sequence) -> None:
        """Its computed whole blocks; where another sequence was faster, that one's are used."""
        if not self.prefix_caching:
            return
        table = sequence.block_table
        pages = sequence.computed // self.block_size
        found, node = self.tree.insert(sequence.token_ids[: pages * self.block_size], table)
        for page, block in enumerate(found):
            if table[page] != block:
                self._references[block] += 1
                self._release(table[page])
                table[page] = block
        for block in table[len(found) : pages]:
            self._in_tree[block] = True
        self._lock(sequence, node)

    def _lock(self, sequence: Sequence, node: Node) -> None:
        self.tree.lock(node)
        if sequence in self._locked:
            self.tree.unlock(self._locked[sequence])
        self._locked[sequence] = node

    def _new_block(self) -> int:
        if not self._free:
            for block in self.tree.evict(1):
                self._in_tree[block] = False
                self._free[block] = None
                self.evictions += 1
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0 and not self._in_tree[block]:
            self._free[block] = None
