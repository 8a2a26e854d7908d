"""Task 1, block-manager: which blocks of the cache belong to which sequence."""


class BlockManager:
    """Blocks 0 to num_blocks - 1, each with room for the keys and values of block_size tokens.

    A block counts the sequences that use it, and is free when none does. Sequences are named by the
    caller, by any hashable name: a string (the empty one, too), a number, a tuple. A block is an
    int; which of the free ones are given out is yours to choose.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        raise NotImplementedError("block_manager.BlockManager is yours to write")

    @property
    def num_free(self) -> int:
        """How many blocks no sequence uses."""
        raise NotImplementedError("block_manager.BlockManager.num_free is yours to write")

    def table(self, sequence: object) -> list[int]:
        """The blocks of a sequence, in the order of its tokens; empty for an unknown one.

        What the caller does to the list changes nothing here.
        """
        raise NotImplementedError("block_manager.BlockManager.table is yours to write")

    def grow(self, sequence: object, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Make room for tokens `start` to `stop` - 1 of a sequence, which will be written next.

        The sequence has blocks for its tokens before `start` already; an unknown one starts at 0.
        `start` may lie further ahead than its last token: what is there is written over. It keeps
        blocks that lie behind `stop`. With `start` = `stop` there is nothing to do.
        Every block that one of these tokens falls into must belong to this sequence alone: where
        another sequence uses it too (see `fork`), replace it by a free block in this table, and
        return the pair (old block, new block), so that the caller copies what is in it. Blocks that
        hold none of these tokens stay as they are, shared or not.

        Returns the copies, mostly an empty list. Returns None where there are too few free blocks
        for all of it, and only there; then nothing is changed at all.
        """
        raise NotImplementedError("block_manager.BlockManager.grow is yours to write")

    def fork(self, parent: object, child: object) -> None:
        """Let `child`, a new sequence, use the same blocks as `parent`, a known one.

        No block is taken; from then on each of the two grows for itself.
        """
        raise NotImplementedError("block_manager.BlockManager.fork is yours to write")

    def free(self, sequence: object) -> None:
        """Forget a sequence. Its blocks are free unless another sequence uses them.

        Nothing happens for an unknown one, so a sequence may be freed twice.
        """
        raise NotImplementedError("block_manager.BlockManager.free is yours to write")
