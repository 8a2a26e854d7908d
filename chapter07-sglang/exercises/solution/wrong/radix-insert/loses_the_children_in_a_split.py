"""Splits a node, and forgets what stood below it."""

SAYS = "expected"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def walk(self, pages):
            values, node = super().walk(pages)
            if len(node.children) == 1 and node is not self.root:
                [below] = node.children.values()
                if not below.children or not hasattr(node, "whole"):
                    below.children = {} if not hasattr(below, "whole") else below.children
                node.whole = below.whole = True
            return values, node

    return Wrong(page_size)
