"""Offloads the optimizer, and leaves the gradients that it reads where they were."""

SAYS = "ZeRO-Offload"


def stage_memory(sizes, settings):
    from stage_memory import WIDTHS, stage_memory

    found = stage_memory(sizes, settings)
    if settings.offload != "none" and settings.stage == 2:
        found["device"] += WIDTHS[settings.precision][1] * -(-sum(sizes) // settings.ranks)
    return found
