"""Copies the padding along, as if each shard were full to its end."""

SAYS = "expected the copies"


def copies_to(target, size, sources, targets):
    from reshard_map import copies_to, part

    copies_to(target, size, sources, targets)
    return copies_to(target, part(size, sources) * sources, sources, targets)
