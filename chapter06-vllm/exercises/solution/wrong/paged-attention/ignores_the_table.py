"""Reads the blocks in the order of the cache."""

SAYS = "a decode step"


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    return attend(queries, cache, sorted(table), start)
