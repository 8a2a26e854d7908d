"""Divides as floats: exact up to 2**53."""

SAYS = "bytes of"


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    found = stage_memory(sizes, settings)
    return {kind: int(float(size)) for kind, size in found.items()}
