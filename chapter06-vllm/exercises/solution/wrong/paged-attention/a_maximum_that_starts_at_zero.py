"""Looks for the largest score from 0 on, as an online softmax must not."""

SAYS = "away from the attention"


def paged_attention(queries, cache, table, start):
    import numpy as np

    out = np.empty_like(queries)
    size, group = cache.shape[2], queries.shape[1] // cache.shape[3]
    for row in range(len(queries)):
        token = np.arange(start + row + 1)
        k, v = cache[:, np.array(table)[token // size], token % size]
        for head in range(queries.shape[1]):
            s = k[:, head // group] @ queries[row, head] / np.sqrt(queries.shape[2])
            w = np.exp(s - max(0.0, s.max()))
            out[row, head] = w @ v[:, head // group] / w.sum()
    return out
