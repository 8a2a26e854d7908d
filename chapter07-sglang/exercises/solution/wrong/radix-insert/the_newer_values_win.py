"""Stores the caller's values over those that were there, whose places are lost."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            known = super().insert(tokens, values)
            node, pages, values = self.root, self.whole_pages(tokens), list(values)
            while pages:
                node = node.children[pages[0]]
                node.values = values[: len(node.pages)]
                pages, values = pages[len(node.pages) :], values[len(node.pages) :]
            return known

    return Wrong(page_size)
