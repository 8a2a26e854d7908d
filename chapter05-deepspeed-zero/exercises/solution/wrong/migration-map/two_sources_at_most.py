"""A part lies on one source rank or on two: the rest is forgotten."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies = copies_to(target, sizes, sources, targets)
    return [
        copy for at, copy in enumerate(copies) if copy[3] not in [c[3] for c in copies[: at - 1]]
    ]
