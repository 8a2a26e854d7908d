"""The peak is the sum of all kinds' peaks, which come at different moments."""

SAYS = "bytes of peak, got"


def plan_memory(units, settings):
    from plan_memory import plan_memory

    plan = plan_memory(units, settings)
    return plan | {"peak": sum(size for kind, size in plan.items() if kind != "peak")}
