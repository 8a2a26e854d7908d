"""The whole map in the order of texts: rank 10 before rank 2."""

SAYS = "copies"


def reshard_map(size, sources, targets):
    from reshard_map import reshard_map

    return sorted(reshard_map(size, sources, targets), key=lambda copy: list(map(str, copy)))
