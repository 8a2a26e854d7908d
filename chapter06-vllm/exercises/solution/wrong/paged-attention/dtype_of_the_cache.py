"""Gives the result in the cache's type."""

SAYS = "a decode step with another cache"


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    return attend(queries, cache, table, start).astype(cache.dtype)
