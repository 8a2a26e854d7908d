"""Counts a node only where the prompt has all of it."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def match(self, tokens):
            node, values, pages = self.root, [], self.whole_pages(tokens)
            while pages and pages[0] in node.children:
                node = node.children[pages[0]]
                if node.pages != pages[: len(node.pages)]:
                    break
                values += node.values
                pages = pages[len(node.pages) :]
            return values

    return Wrong(page_size)
