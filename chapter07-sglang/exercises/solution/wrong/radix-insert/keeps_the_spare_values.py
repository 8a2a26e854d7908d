"""Stores a block table as it comes, with the blocks behind the whole pages."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            known = super().insert(tokens, values)
            count = len(tokens) // page_size
            node, pages = self.root, self.whole_pages(tokens)
            while pages:
                node = node.children[pages[0]]
                pages = pages[len(node.pages) :]
            if known < count:
                node.values = [*node.values, *values[count:]]
            return known

        def match(self, tokens):
            super().match(tokens)
            node, values, pages = self.root, [], self.whole_pages(tokens)
            while pages and pages[0] in node.children:
                node = node.children[pages[0]]
                values += node.values
                pages = pages[len(node.pages) :]
            return values

    return Wrong(page_size)
