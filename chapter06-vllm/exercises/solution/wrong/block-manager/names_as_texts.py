"""Takes every name for its text: 1 and "1" become one sequence."""

SAYS = "after"


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    class Texts(BlockManager):
        def table(self, sequence):
            return super().table(str(sequence))

        def grow(self, sequence, start, stop):
            return super().grow(str(sequence), start, stop)

        def fork(self, parent, child):
            super().fork(str(parent), str(child))

        def free(self, sequence):
            super().free(str(sequence))

    return Texts(num_blocks, block_size)
