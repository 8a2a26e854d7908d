"""Gives the map from M to K for that from K to M, with its columns exchanged and cut twice."""

SAYS = "expected"


def reshard_map(size, sources, targets):
    from reshard_map import reshard_map

    reshard_map(size, sources, targets)
    return reshard_map(size, targets, sources)
