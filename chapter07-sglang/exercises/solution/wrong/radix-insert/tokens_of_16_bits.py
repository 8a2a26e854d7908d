"""Keeps tokens in 16 bits, as if vocabularies were that small."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def whole_pages(self, tokens):
            return super().whole_pages([token % 2**16 for token in tokens])

    return Wrong(page_size)
