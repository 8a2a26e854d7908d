"""Returns the very list that it works with."""

SAYS = "the caller changed the list"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def table(self, sequence):
            return self.tables.setdefault(sequence, [])

    return Wrong(num_blocks, block_size)
