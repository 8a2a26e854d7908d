"""Finds a child by its first page as text, in which 1, 11 is 11, 1."""

SAYS = "pages of"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    def text(page):
        return "".join(map(str, page))

    class ByText(dict):
        def __contains__(self, page):
            return super().__contains__(text(page))

        def __getitem__(self, page):
            return super().__getitem__(text(page))

        def __setitem__(self, page, node):
            super().__setitem__(text(page), node)

    tree = RadixTree(page_size)
    tree.root.children = ByText()
    return tree
