"""Counts the two moments, and forgets the float32 copy of the weights."""

SAYS = "published are"


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    found = stage_memory(sizes, settings)
    if settings.precision == "mixed" and settings.offload == "none":
        whole = sum(sizes)
        part = -(-whole // settings.ranks) if settings.stage else whole
        found["device"] -= 4 * part
    return found
