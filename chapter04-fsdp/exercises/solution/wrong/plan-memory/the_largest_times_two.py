"""Takes the largest unit twice for the two that are whole."""

SAYS = "bytes of gathered, got"


def plan_memory(units, settings):
    from plan_memory import plan_memory

    plan = plan_memory(units, settings)
    if settings.mode in ("full", "hybrid") and units:
        alone = plan_memory([max(units)], settings)["gathered"]
        plan["gathered"] = alone * min(len(units), settings.prefetch + 1)
    return plan
