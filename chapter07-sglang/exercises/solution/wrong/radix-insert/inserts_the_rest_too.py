"""Rounds up: the tokens that fill no page become a page of their own."""

SAYS = "pages of 4"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def whole_pages(self, tokens):
            starts = range(0, len(tokens), page_size)
            return [tuple(tokens[start : start + page_size]) for start in starts]

    return Wrong(page_size)
