"""Splits a node, and forgets what stood below it."""

SAYS = "expected"


def make_radix_tree(page_size):
    import radix_insert

    def split(node, at):
        rest = radix_insert.Node(node.pages[at:], node.values[at:])
        node.pages, node.values = node.pages[:at], node.values[:at]
        node.children = {rest.pages[0]: rest}

    radix_insert.split = split
    return radix_insert.RadixTree(page_size)
