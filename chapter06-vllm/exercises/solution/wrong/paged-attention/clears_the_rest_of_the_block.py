"""Writes zeros behind the last token, where a fork may have its own."""

SAYS = "other places were written"


def write_keys_and_values(cache, table, start, keys, values):
    from paged_attention import write

    write(cache, table, start, keys, values)
    stop, size = start + len(keys), cache.shape[2]
    if stop % size:
        cache[:, table[stop // size], stop % size :] = 0
