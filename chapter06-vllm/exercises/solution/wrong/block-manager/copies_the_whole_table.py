"""Copies every shared block, also those that are not written."""

SAYS = "which holds none of the tokens to be written"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class CopiesAll(BlockManager):
        def grow(self, sequence, start, stop):
            return super().grow(sequence, 0, stop)

    return CopiesAll(num_blocks, block_size)
