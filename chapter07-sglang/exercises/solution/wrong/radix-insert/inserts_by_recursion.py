"""Finds by a loop where to insert, and descends there by recursion."""

SAYS = "RecursionError"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    def known(node, pages):
        child = node.children.get(pages[0]) if pages else None
        return len(child.pages) + known(child, pages[len(child.pages) :]) if child else 0

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            pages = self.whole_pages(tokens)
            self.walk(pages)
            before = known(self.root, pages)
            super().insert(tokens, values)
            return before

    return Wrong(page_size)
