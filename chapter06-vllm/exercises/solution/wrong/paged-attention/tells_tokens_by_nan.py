"""Takes every place that is not nan for a token of the sequence, whatever the start."""

SAYS = "a place was read in which no token"


def paged_attention(queries, cache, table, start):
    import numpy as np

    import paged_attention as own

    whole = len(table) * cache.shape[2]
    block, place = own.places(table, 0, whole, cache.shape[2])
    there = int((~np.isnan(cache[0, block, place, 0, 0])).cumprod().sum())
    seen = max(there, start + len(queries))
    padded = np.concatenate([queries, np.zeros((seen - start - len(queries), *queries.shape[1:]))])
    late = own.attend(padded.astype(queries.dtype), cache, table, seen - len(padded))
    return late[: len(queries)]
