"""Takes every page for a token, whatever it is told."""

SAYS = "pages of"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    return RadixTree(1)
