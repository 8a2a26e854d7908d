"""Counts four tokens to a block, whatever it is told."""

SAYS = "the table is"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def grow(self, sequence, start, stop):
            self.block_size = 4
            return super().grow(sequence, start, stop)

    return Wrong(num_blocks, block_size)
