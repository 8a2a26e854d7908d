"""Lets each token of a chunk see the whole chunk."""

SAYS = "away from the attention"


def paged_attention(queries, cache, table, start):
    import numpy as np

    from paged_attention import attend

    last = start + len(queries) - 1
    return np.concatenate([attend(query[None], cache, table, last) for query in queries])
