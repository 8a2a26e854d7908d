"""Frees units after forward in grad mode, too."""

SAYS = "all, at the end of forward"


def plan_memory(units, settings):
    from dataclasses import replace

    from plan_memory import plan_memory

    mode = "full" if settings.mode == "grad" else settings.mode
    return plan_memory(units, replace(settings, mode=mode))
