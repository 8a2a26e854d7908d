"""Matches token by token, also where that ends within a page."""

SAYS = "expected"


def make_radix_tree(page_size):
    from radix_insert import RadixTree

    class Wrong(RadixTree):
        def insert(self, tokens, values):
            from math import ceil

            spread = [values[i // page_size] for i in range(len(values) * page_size)]
            return ceil(super().insert(tokens, spread) / page_size)

        def match(self, tokens):
            return super().match(tokens)[::page_size]

    return Wrong(1)
