"""Right copies, in the order of the last source first."""

SAYS = "expected the copies"


def copies_to(target, size, sources, targets):
    from reshard_map import copies_to

    return copies_to(target, size, sources, targets)[::-1]
