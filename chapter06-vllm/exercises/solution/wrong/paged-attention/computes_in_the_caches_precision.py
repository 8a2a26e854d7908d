"""Rounds the queries to the cache's type, before it multiplies them with the keys."""

SAYS = "a decode step with another cache"


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    return attend(queries.astype(cache.dtype), cache, table, start).astype(queries.dtype)
