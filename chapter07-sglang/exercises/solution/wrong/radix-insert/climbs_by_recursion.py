"""Calls itself for each node on the way, and Python stops it in a deep tree."""

SAYS = "RecursionError"


def make_radix_tree(page_size):
    from itertools import chain

    from radix_insert import RadixTree

    def below(node, path):
        if not node.children:
            return [path] if path else []
        found = []
        for child in node.children.values():
            found += below(child, [*path, list(chain(*child.pages))])
        return found

    class Wrong(RadixTree):
        def paths(self):
            return below(self.root, [])

    return Wrong(page_size)
