"""Lets functions call each other 2,000 deep; a tree is deeper."""

SAYS = "RecursionError"


def make_radix_tree(page_size):
    import sys
    from itertools import chain

    from radix_insert import RadixTree

    sys.setrecursionlimit(2000)

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
