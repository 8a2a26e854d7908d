"""Counts sixteen tokens to a block, as most engines do."""

SAYS = "are not in block"


def write_keys_and_values(cache, table, start, keys, values):
    from paged_attention import write

    places = [(token // 16, token % 16) for token in range(start, start + len(keys))]
    if cache.shape[2] < 16:
        places = [(min(b, len(table) - 1), p % cache.shape[2]) for b, p in places]
    for number, (block, place) in enumerate(places):
        write(cache[:, :, place : place + 1], table, block, keys[[number]], values[[number]])
