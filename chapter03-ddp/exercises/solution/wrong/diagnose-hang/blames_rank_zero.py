"""Takes rank 0 for right, whatever the others do."""

SAYS = "it is order swap, rank 0"


def diagnose(dumps, world_size):
    from dataclasses import replace

    from diagnose_hang import diagnose

    found = diagnose(dumps, world_size)
    return replace(found, rank=1) if found.rank == 0 and found.seq is not None else found
