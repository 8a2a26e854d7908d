"""Takes blocks one by one, and keeps the first ones when there are too few."""

SAYS = "nothing may be changed"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Greedy(BlockManager):
        def grow(self, sequence, start, stop):
            copies = []
            for token in range(start, stop):
                more = super().grow(sequence, token, token + 1)
                if more is None:
                    return None
                copies += more
            return copies

    return Greedy(num_blocks, block_size)
