"""Copies tokens by a method that lists have, and tuples do not."""

SAYS = "AttributeError"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def match(self, tokens):
            return super().match(tokens.copy())

        def insert(self, tokens, values):
            return super().insert(tokens.copy(), values)

    return Wrong(page_size)
