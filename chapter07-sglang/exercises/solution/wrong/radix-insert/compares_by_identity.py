"""Compares tokens by `is`, which holds for small numbers alone."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Page(tuple):
        __hash__ = tuple.__hash__

        def __eq__(self, other):
            return all(one is two for one, two in zip(self, other, strict=True))

        def __ne__(self, other):
            return not self == other

    class Wrong(RadixTree):
        def whole_pages(self, tokens):
            return [Page(page) for page in super().whole_pages(tokens)]

    return Wrong(page_size)
