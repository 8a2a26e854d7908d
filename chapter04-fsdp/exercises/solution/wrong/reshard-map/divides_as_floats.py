"""math.ceil(size / ranks): right up to 2**53 elements."""

SAYS = "elements"


def copies_to(target, size, sources, targets):
    import math

    from reshard_map import copies_to

    copies_to(target, size, sources, targets)
    have, want = math.ceil(size / sources), math.ceil(size / targets)
    at, stop, copies = target * want, min(size, (target + 1) * want), []
    while at < stop:
        length = min(have - at % have, stop - at)
        copies.append((at // have, at % have, at - target * want, length))
        at += length
    return copies
