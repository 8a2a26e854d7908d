"""Takes the empty name for no name."""

SAYS = "grow('', 0,"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def grow(self, sequence, start, stop):
            return super().grow(sequence, start, stop) if sequence != "" else []

    return Wrong(num_blocks, block_size)
