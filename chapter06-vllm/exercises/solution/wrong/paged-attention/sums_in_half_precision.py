"""Computes in the queries' own type, where a score of 20 is rounded to a hundredth."""

SAYS = "tokens of float16"


def paged_attention(queries, cache, table, start):
    import numpy as np

    out = np.empty_like(queries)
    size, group = cache.shape[2], queries.shape[1] // cache.shape[3]
    for row in range(len(queries)):
        token = np.arange(start + row + 1)
        k, v = cache[:, np.array(table)[token // size], token % size]
        for head in range(queries.shape[1]):
            s = (
                k[:, head // group]
                @ queries[row, head]
                / queries.dtype.type(queries.shape[2] ** 0.5)
            )
            w = np.exp(s - s.max())
            out[row, head] = w @ v[:, head // group] / w.sum()
    return out
