"""Writes each number of ranks into the settings that it was given, and leaves it there."""

SAYS = "fewest_ranks changed the settings"


def fewest_ranks(units, settings, budget, most):
    from plan_memory import plan_memory

    step = settings.replicas if settings.mode == "hybrid" else 1
    for ranks in range(step, most + 1, step):
        object.__setattr__(settings, "ranks", ranks)
        if plan_memory(units, settings)["peak"] <= budget:
            return ranks
    return None
