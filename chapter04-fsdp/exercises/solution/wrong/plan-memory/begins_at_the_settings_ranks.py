"""Looks from the settings' ranks on."""

SAYS = "ranks, got"


def fewest_ranks(units, settings, budget, most):
    from dataclasses import replace

    from plan_memory import plan_memory

    step = settings.replicas if settings.mode == "hybrid" else 1
    for ranks in range(settings.ranks // step * step or step, most + 1, step):
        if plan_memory(units, replace(settings, ranks=ranks))["peak"] <= budget:
            return ranks
    return None
