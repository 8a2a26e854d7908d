"""Takes each parameter for as long as all its parts."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    found, have = [], -(-sum(sizes) // max(1, sources))
    for source, begin, end, number, there in copies_to(target, sizes, sources, targets):
        full = there + end - begin == sizes[number] - target * -(-sizes[number] // targets)
        missing = -(-sizes[number] // targets) - there - (end - begin)
        more = min(missing, have - end) if full else 0
        found.append((source, begin, end + more, number, there))
    return found
