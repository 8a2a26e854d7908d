"""Finds a child by its first token, also where another one begins with the same."""

SAYS = "pages of 4"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class ByToken(dict):
        def __contains__(self, page):
            return super().__contains__(page[0])

        def __getitem__(self, page):
            return super().__getitem__(page[0])

        def __setitem__(self, page, node):
            super().__setitem__(page[0], node)

    tree = RadixTree(page_size)
    tree.root.children = ByToken()
    return tree
