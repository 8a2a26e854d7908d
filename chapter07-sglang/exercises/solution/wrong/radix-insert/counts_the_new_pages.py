"""Returns how many pages are new instead of how many were there."""

SAYS = "pages to be cached before, got"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            return len(tokens) // page_size - super().insert(tokens, values)

    return Wrong(page_size)
