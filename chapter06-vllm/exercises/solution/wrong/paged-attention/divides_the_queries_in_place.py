"""Scales the queries that it was given, where they lie."""

SAYS = "attention changed the queries"


def paged_attention(queries, cache, table, start):
    import numpy as np

    import paged_attention as own

    queries /= np.sqrt(queries.shape[2]).astype(queries.dtype)
    return own.attend(queries * queries.shape[2] ** 0.5, cache, table, start)
