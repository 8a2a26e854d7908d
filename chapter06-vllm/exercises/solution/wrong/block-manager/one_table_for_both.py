"""Lets a fork use its parent's table itself, which then grows for both."""

SAYS = "changed the parent's table"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def fork(self, parent, child):
            super().fork(parent, child)
            self.tables[child] = self.tables[parent]

        def grow(self, sequence, start, stop):
            shared = self.tables.get(sequence)
            copies = super().grow(sequence, start, stop)
            if shared is not None:
                shared[:] = self.tables[sequence]
                self.tables[sequence] = shared
            return copies

    return Wrong(num_blocks, block_size)
