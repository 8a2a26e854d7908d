"""math.ceil(n / ranks): right up to 2**53 elements."""

SAYS = "target rank 0: "


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies_to(target, sizes, sources, targets)
    import math

    have, copies, first = math.ceil(sum(sizes) / sources), [], 0
    for number, size in enumerate(sizes):
        want = math.ceil(size / targets)
        begin = at = first + target * want
        while at < min(first + size, begin + want):
            length = min(have - at % have, min(first + size, begin + want) - at)
            copies.append((at // have, at % have, at % have + length, number, at - begin))
            at += length
        first += size
    return copies
