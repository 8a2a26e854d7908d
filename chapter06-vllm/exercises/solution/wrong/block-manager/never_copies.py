"""Writes into a block that another sequence reads."""

SAYS = "is used by two sequences"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class NeverCopies(BlockManager):
        def grow(self, sequence, start, stop):
            return super().grow(sequence, max(start, len(self.table(sequence)) * block_size), stop)

    return NeverCopies(num_blocks, block_size)
