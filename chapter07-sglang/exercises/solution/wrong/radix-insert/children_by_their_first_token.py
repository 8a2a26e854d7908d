"""Finds a child by its first token, so that of two that share it one is lost."""

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

    class Wrong(RadixTree):
        def walk(self, pages):
            values, node = super().walk(pages)
            waiting = [self.root]
            while waiting:
                each = waiting.pop()
                if type(each.children) is dict:
                    own, each.children = each.children, ByToken()
                    for page, child in own.items():
                        each.children[page] = child
                waiting += each.children.values()
            return values, node

    return Wrong(page_size)
