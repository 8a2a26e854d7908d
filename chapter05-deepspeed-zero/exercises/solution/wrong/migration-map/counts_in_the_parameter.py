"""`there` counts from the beginning of the parameter, not of the rank's part of it."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies = copies_to(target, sizes, sources, targets)
    parts = [-(-size // targets) for size in sizes]
    return [(s, a, b, number, there + target * parts[number]) for s, a, b, number, there in copies]
