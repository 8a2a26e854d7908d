"""Task 1, radix-insert: which prefix of a prompt is cached, found in a tree of token runs."""

from collections.abc import Sequence


class RadixTree:
    """Cached sequences, in whole pages of `page_size` tokens; each page has a value, an int.

    A node holds a run of one page or more, and its children begin with different pages (they may
    begin with the same token, where a page has several). What stands on the way from the top to a
    node is cached, page by page. The value is the number of the page's place in the cache; the tree
    only keeps it.
    Source: Zheng et al., "SGLang", NeurIPS 2024, section 3.
    """

    def __init__(self, page_size: int) -> None:
        raise NotImplementedError("radix_insert.RadixTree is yours to write")

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The values of the longest cached prefix of `tokens`, one for each page.

        Tokens that do not fill a last page are ignored. Where the prefix ends within a node, that
        node is split in two there, so that a node ends with the prefix: whoever uses the prefix can
        lock that node, and what lies below it can go.

        What the caller does to the list changes nothing here.
        """
        raise NotImplementedError("radix_insert.RadixTree.match is yours to write")

    def insert(self, tokens: Sequence[int], values: Sequence[int]) -> int:
        """Cache the whole pages of `tokens`; how many of them were cached before.

        `values` has one for each whole page of `tokens`, or more; those behind are not used. Pages
        that were cached keep the values that they have. What was not cached becomes one new node,
        below the node that ends where the cached prefix does: as in `match`, a node within which
        that prefix ends is split there first, also where nothing is new behind it.

        Later changes of `tokens` and `values` by the caller change nothing here.
        """
        raise NotImplementedError("radix_insert.RadixTree.insert is yours to write")

    def paths(self) -> list[list[list[int]]]:
        """Of each leaf, the runs of tokens of the nodes from the top down to it, in any order.

        The empty root is no node of a path; an empty tree has no path. A tree may be several
        thousand nodes deep, more than Python functions may call each other.
        """
        raise NotImplementedError("radix_insert.RadixTree.paths is yours to write")
