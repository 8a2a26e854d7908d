"""Right, with a copy for each element."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    return [
        (source, at, at + 1, number, there + at - begin)
        for source, begin, end, number, there in copies_to(target, sizes, sources, targets)
        for at in range(begin, min(end, begin + 10**4))
    ]
