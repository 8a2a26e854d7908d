"""Deals the query heads out in turns, as if head 1 belonged to key-value head 1."""

SAYS = "grouped heads"


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    kv_heads = cache.shape[3]
    result = queries.copy()
    for head in range(kv_heads):
        one = cache[:, :, :, head : head + 1]
        result[:, head::kv_heads] = attend(queries[:, head::kv_heads], one, table, start)
    return result
