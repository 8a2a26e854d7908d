"""Gathers in the type of the shards."""

SAYS = "of 2 bytes gathered"


def plan_memory(units, settings):
    from dataclasses import replace

    from plan_memory import plan_memory

    return plan_memory(units, replace(settings, gathered=settings.weight))
