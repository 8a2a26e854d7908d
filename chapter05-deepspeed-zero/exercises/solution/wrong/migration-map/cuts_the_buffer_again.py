"""Cuts the whole buffer into parts, as stage 2 does it, and not each parameter."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies_to(target, sizes, sources, targets)
    whole = copies_to(target, [sum(sizes)], sources, targets)
    want, copies = -(-sum(sizes) // targets), []
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        for source, begin, end, _, there in whole:
            at = target * want + there
            low, high = max(at, first), min(at + end - begin, first + size)
            if low < high:
                copies.append((source, begin + low - at, begin + high - at, number, low - first))
    return copies
