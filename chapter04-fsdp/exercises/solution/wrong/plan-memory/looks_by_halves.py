"""A binary search over the ranks, as if more ranks never needed more."""

SAYS = "ranks, got"


def fewest_ranks(units, settings, budget, most):
    from dataclasses import replace

    from plan_memory import plan_memory

    step = settings.replicas if settings.mode == "hybrid" else 1
    low, high = 0, most // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        peak = plan_memory(units, replace(settings, ranks=middle * step))["peak"]
        low, high = (low, middle) if peak <= budget else (middle, high)
    return high * step if high * step <= most else None
