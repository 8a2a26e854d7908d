"""Right, element by element, in as many messages."""

SAYS = "expected the copies"


def copies_to(target, size, sources, targets):
    from reshard_map import copies_to

    copies = copies_to(target, size, sources, targets)
    return [(s, i + k, j + k, 1) for s, i, j, n in copies for k in range(min(n, 1000))]
