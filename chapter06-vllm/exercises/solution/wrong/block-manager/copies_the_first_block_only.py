"""Copies the first of the shared blocks that are written, and writes into the others."""

SAYS = "nothing may be changed"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Wrong(BlockManager):
        def grow(self, sequence, start, stop):
            first_ends = (start // block_size + 1) * block_size
            copies = super().grow(sequence, start, min(stop, first_ends))
            behind = max(len(self.table(sequence)) * block_size, first_ends)
            if copies is None or stop <= behind:
                return copies
            more = super().grow(sequence, behind, stop)
            return None if more is None else copies + more

    return Wrong(num_blocks, block_size)
