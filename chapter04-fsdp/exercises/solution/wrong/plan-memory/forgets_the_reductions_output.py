"""A reduction writes its result where the whole gradient was."""

SAYS = "in the reduction: whole and reduced, side by side"


def plan_memory(units, settings):
    from plan_memory import plan_memory, sharded_moments, shards_of

    plan = plan_memory(units, settings)
    if settings.mode == "none":
        return plan
    shards = shards_of(settings)
    moments = list(sharded_moments([-(-unit // shards) for unit in units], shards, settings))
    return plan | {"peak": max(map(sum, [*moments[::2], moments[-1]]))}
