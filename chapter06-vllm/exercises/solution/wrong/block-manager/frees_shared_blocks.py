"""Frees a sequence's blocks whoever else uses them."""

SAYS = "blocks are in a table and num_free is"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Frees(BlockManager):
        def free(self, sequence):
            for block in self.tables.pop(sequence, []):
                self.users[block] = 0

    return Frees(num_blocks, block_size)
