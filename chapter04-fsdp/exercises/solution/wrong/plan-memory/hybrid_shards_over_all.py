"""Shards over all ranks in hybrid mode, too."""

SAYS = "2 ranks share a copy"


def plan_memory(units, settings):
    from dataclasses import replace

    from plan_memory import plan_memory

    plan_memory(units, settings)
    if settings.mode == "hybrid":
        settings = replace(settings, mode="full")
    return plan_memory(units, settings)
