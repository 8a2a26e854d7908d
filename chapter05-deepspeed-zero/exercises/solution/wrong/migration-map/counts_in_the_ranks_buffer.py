"""`there` counts from the beginning of all that the rank has."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies = copies_to(target, sizes, sources, targets)
    parts = [-(-size // targets) for size in sizes]
    return [(s, a, b, n, there + sum(parts[:n])) for s, a, b, n, there in copies]
