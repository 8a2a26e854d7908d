"""Attends to every slot of the blocks, also those behind the last token, masked with zeros."""

SAYS = "in which no token of the sequence is"


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    size = cache.shape[2]
    whole = -(-(start + len(queries)) // size) * size
    behind = whole - start - len(queries)
    last = cache[:, table[whole // size - 1]].sum(axis=(0, 1)).mean()
    return attend(queries, cache, table, start) + (0 * last if behind else 0)
