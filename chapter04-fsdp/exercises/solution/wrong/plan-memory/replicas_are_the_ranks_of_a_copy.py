"""Takes `replicas` for the number of ranks that share a copy."""

SAYS = "bytes of"


def plan_memory(units, settings):
    from dataclasses import replace

    from plan_memory import plan_memory

    plan_memory(units, settings)
    if settings.mode == "hybrid":
        settings = replace(settings, replicas=settings.ranks // settings.replicas)
    return plan_memory(units, settings)
