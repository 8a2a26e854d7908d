"""The radix tree: which prefixes of token sequences are cached, and where.

An edge of a trie holds one token; here a node holds a run of them, as long as nobody has left it in
the middle, so a tree has few nodes for many tokens. Each token has a value, the slot of its key and
value in the cache, which the tree never reads (Zheng et al., "SGLang: Efficient Execution of
Structured Language Model Programs", NeurIPS 2024, section 3).

    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [70, 71, 72, 73])
    values, node = tree.match([1, 2, 9])       # [70, 71]; the node is split after 2
    tree.lock(node)                            # a request uses them
    tree.evict(2)                              # [72, 73]: the leaf that nobody uses
"""

from collections.abc import Iterator, Sequence
from itertools import count


class Node:
    """A run of tokens below its parent; `used` is when it was last matched, on the tree's clock."""

    __slots__ = ("children", "locks", "parent", "tokens", "used", "values")

    def __init__(self, parent: "Node | None", tokens: Sequence[int], values: list[int]) -> None:
        self.parent = parent
        self.tokens, self.values = tuple(tokens), values
        self.children: dict[tuple[int, ...], Node] = {}  # by their first page of tokens
        self.locks = 0  # requests that use this node or one below it
        self.used = 0

    def path(self) -> "Iterator[Node]":
        """This node, its parent, and so on; without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class RadixTree:
    """Longest known prefixes, in whole pages of `page_size` tokens; one value for each page.

    `evictable` and `protected` count pages that nobody has locked, and that somebody has.
    """

    def __init__(self, page_size: int = 1) -> None:
        self.page_size = page_size
        self.root = Node(None, (), [])
        self.evictable = self.protected = 0
        self._clock = count(1)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], Node]:
        """The values of the longest cached prefix of `tokens`, and the node where it ends.

        It may end within a node, which is split there, so that it can be locked.
        """
        return self._walk(self._whole_pages(tokens))

    def insert(self, tokens: Sequence[int], values: Sequence[int]) -> tuple[list[int], Node]:
        """Add `tokens` with one value a page; the values that were there, and the last node.

        What was there keeps its values: the caller's own for those pages are not stored.
        """
        key = self._whole_pages(tokens)
        found, node = self._walk(key)
        if rest := key[len(found) * self.page_size :]:
            leaf = Node(node, rest, list(values[len(found) : len(key) // self.page_size]))
            leaf.used = next(self._clock)  # after what it was split off from
            node.children[rest[: self.page_size]] = leaf
            self.evictable += len(leaf.values)
            node = leaf
        return found, node

    def lock(self, node: Node) -> None:
        """Keep the prefix that ends here, as often as it is called."""
        for each in node.path():
            if each.locks == 0:
                self.evictable -= len(each.values)
                self.protected += len(each.values)
            each.locks += 1

    def unlock(self, node: Node) -> None:
        for each in node.path():
            each.locks -= 1
            if each.locks == 0:
                self.evictable += len(each.values)
                self.protected -= len(each.values)

    def evict(self, pages: int) -> list[int]:
        """Give up the leaves longest unused until `pages` are freed; the values of all of them.

        Only leaves go, for a prefix serves all that follow it; a parent left without children is a
        leaf. What is locked stays, so there may be fewer.
        """
        leaves = {node for node in self.nodes() if not node.children and not node.locks}
        freed: list[int] = []
        while leaves and len(freed) < pages:
            oldest = min(leaves, key=lambda leaf: leaf.used)
            leaves.remove(oldest)
            freed += oldest.values
            parent = oldest.parent
            assert parent is not None
            del parent.children[oldest.tokens[: self.page_size]]
            if parent is not self.root and not parent.children and not parent.locks:
                leaves.add(parent)
        self.evictable -= len(freed)
        return freed

    def nodes(self) -> Iterator[Node]:
        """All but the root."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def _whole_pages(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens[: len(tokens) - len(tokens) % self.page_size])

    def _walk(self, key: tuple[int, ...]) -> tuple[list[int], Node]:
        """Down along `key`; the values found, the last node, split where the key leaves it."""
        node, values, now = self.root, list[int](), next(self._clock)
        while child := node.children.get(key[: self.page_size]):
            common = common_pages(child.tokens, key, self.page_size)
            child.used = now
            node = child
            if common < len(child.values):
                node = self._split(child, common)
            values += node.values
            key = key[len(node.tokens) :]
            if node is not child:
                break
        return values, node

    def _split(self, node: Node, pages: int) -> Node:
        """Put a new node with the first `pages` of `node` above the rest of it."""
        at = pages * self.page_size
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.tokens[:at], node.values[:pages])
        upper.locks, upper.used = node.locks, node.used
        node.parent, node.tokens, node.values = upper, node.tokens[at:], node.values[pages:]
        parent.children[upper.tokens[: self.page_size]] = upper
        upper.children[node.tokens[: self.page_size]] = node
        return upper


def common_pages(one: Sequence[int], other: Sequence[int], page_size: int) -> int:
    """How many whole pages both begin with."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:  # as mostly: compared at once
        return shorter // page_size
    differs = next(i for i in range(shorter) if one[i] != other[i])
    return differs // page_size
