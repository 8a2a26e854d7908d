"""Returns the very list that a node keeps."""

SAYS = "expected the values"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def match(self, tokens):
            values = super().match(tokens)
            first = self.root.children.get(tuple(tokens[:page_size]))
            return first.values if first and values == first.values else values

    return Wrong(page_size)
