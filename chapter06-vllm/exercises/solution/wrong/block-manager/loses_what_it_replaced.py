"""Copies a shared block and never lets go of the old one."""

SAYS = "and was copied"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def grow(self, sequence, start, stop):
            copies = super().grow(sequence, start, stop)
            for old, _ in copies or []:
                self.users[old] += 1
            return copies

    return Wrong(num_blocks, block_size)
