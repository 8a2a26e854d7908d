"""Matches within a node, and leaves the node as it is."""

SAYS = "the first that is missing"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def match(self, tokens):
            from copy import deepcopy

            return deepcopy(self).walk(self.whole_pages(tokens))[0]

    return Wrong(page_size)
