"""(source, begin, length, …) as in chapter 4's map."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies = copies_to(target, sizes, sources, targets)
    return [(source, begin, end - begin, *rest) for source, begin, end, *rest in copies]
