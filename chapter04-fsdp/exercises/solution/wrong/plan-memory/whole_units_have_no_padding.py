"""A whole unit has its parameters only; the all-gather writes the padding too."""

SAYS = "whole units have their padding"


def plan_memory(units, settings):
    from plan_memory import plan_memory

    plan = plan_memory(units, settings)
    if settings.mode in ("full", "hybrid") and units:
        last = range(len(units))
        most = max(sum(units[max(0, i - settings.prefetch) : i + 1]) for i in last)
        plan["gathered"] = most * settings.gathered
    return plan
