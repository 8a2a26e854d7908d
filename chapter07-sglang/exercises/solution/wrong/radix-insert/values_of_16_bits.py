"""Keeps values in 16 bits, as if caches were that small."""

SAYS = "OverflowError"


def make_radix_tree(page_size):
    from array import array

    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            return super().insert(tokens, array("h", values))

    return Wrong(page_size)
