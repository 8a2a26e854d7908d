"""Gives up when it would take the last free block: >= for >."""

SAYS = "found too few blocks"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def grow(self, sequence, start, stop):
            before, users = self.table(sequence), list(self.users)
            copies = super().grow(sequence, start, stop)
            if self.num_free or self.users == users:
                return copies
            self.tables[sequence], self.users = before, users
            return None

    return Wrong(num_blocks, block_size)
