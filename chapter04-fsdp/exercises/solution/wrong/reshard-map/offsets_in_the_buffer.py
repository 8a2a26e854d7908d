"""Tells where elements are in the buffer, not in the shard."""

SAYS = "expected the copies"


def copies_to(target, size, sources, targets):
    from reshard_map import copies_to, part

    have = part(size, sources)
    return [(s, s * have + i, j, n) for s, i, j, n in copies_to(target, size, sources, targets)]
