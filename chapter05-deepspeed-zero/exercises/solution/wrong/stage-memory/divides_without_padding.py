"""Divides the sums, and rounds down."""

SAYS = "are padded to 20"


def stage_memory(sizes, settings):
    from stage_memory import WIDTHS, stage_memory

    found = stage_memory(sizes, settings)
    if settings.offload != "none":
        return found
    whole, first = sum(sizes), zip(WIDTHS[settings.precision], (3, 2, 1), strict=True)
    device = sum(w * whole // (settings.ranks if settings.stage >= s else 1) for w, s in first)
    return {**found, "device": device}
