"""Takes the source's buffer for one in which every parameter is padded."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies_to(target, sizes, sources, targets)
    padded = [-(-size // sources) * sources for size in sizes]
    found = []
    for number, size in enumerate(sizes):
        one = [*padded[:number], size, sum(padded[number:]) - size]
        copies = copies_to(target, one, sources, targets)
        found += [copy for copy in copies if copy[3] == number]
    return found
