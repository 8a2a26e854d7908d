"""Compares how many elements a tensor has, not its shape."""

SAYS = "it is mismatch"


def diagnose(dumps, world_size):
    from copy import deepcopy
    from math import prod

    from diagnose_hang import diagnose

    dumps = deepcopy(dumps)
    for dump in dumps:
        for entry in dump["entries"]:
            entry["shape"] = [prod(entry["shape"])]
    return diagnose(dumps, world_size)
