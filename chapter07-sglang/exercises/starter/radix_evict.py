"""Task 2, radix-evict: which nodes of a radix tree may go, and which of them goes first."""

from collections.abc import Hashable


class Evictor:
    """The nodes of a radix tree, without their tokens: how many pages each has, and who uses it.

    Nodes are named by the caller, by any hashable name but None: a number (0, too), a string (the
    empty one, too), a tuple. None is the root above all others, which has no pages. A node's name
    may be used again when it is gone.
    """

    def __init__(self) -> None:
        raise NotImplementedError("radix_evict.Evictor is yours to write")

    @property
    def evictable(self) -> int:
        """How many pages are in nodes that are not locked."""
        raise NotImplementedError("radix_evict.Evictor.evictable is yours to write")

    @property
    def protected(self) -> int:
        """How many pages are in nodes that are locked."""
        raise NotImplementedError("radix_evict.Evictor.protected is yours to write")

    def add(self, node: Hashable, parent: Hashable | None, pages: int) -> None:
        """A new node of one page or more below `parent`, a known node or the root.

        It is used now, and not locked. The nodes above it are not used by that.
        """
        raise NotImplementedError("radix_evict.Evictor.add is yours to write")

    def split(self, node: Hashable, upper: Hashable, pages: int) -> None:
        """Give the first `pages` pages of `node` to a new node `upper`, between it and its parent.

        `node` keeps its children and the rest of its pages, at least one. `upper` was last used
        when `node` was, and whoever has locked `node` has locked it too.
        """
        raise NotImplementedError("radix_evict.Evictor.split is yours to write")

    def use(self, node: Hashable | None) -> None:
        """`node`, and all nodes above it, are used now."""
        raise NotImplementedError("radix_evict.Evictor.use is yours to write")

    def lock(self, node: Hashable | None) -> None:
        """Lock `node` and all nodes above it, once more; of the root alone nothing is locked.

        A request does so with the node where its cached prefix ends. Several may lock one node.
        Locking does not use a node, and nodes that are added below a locked one are not locked.
        """
        raise NotImplementedError("radix_evict.Evictor.lock is yours to write")

    def unlock(self, node: Hashable | None) -> None:
        """Take back one `lock` of `node`, which was locked by that name."""
        raise NotImplementedError("radix_evict.Evictor.unlock is yours to write")

    def evict(self, pages: int) -> list[Hashable]:
        """Give up nodes until `pages` pages or more are freed; their names, in the order of going.

        Only a leaf may go, a node that nothing stands below and that is not locked. The one longest
        unused goes first, as a whole; a parent without children is a leaf from then on, with its
        own last use. No more go than are needed; fewer pages are freed where no leaf may go. For
        0 pages none goes.
        """
        raise NotImplementedError("radix_evict.Evictor.evict is yours to write")
