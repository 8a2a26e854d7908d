"""math.ceil of a quotient in floats: some bytes off where a unit is large."""

SAYS = "bytes of"


def plan_memory(units, settings):
    import math

    from plan_memory import plan_memory, shards_of

    if settings.mode == "none":
        return plan_memory(units, settings)
    shards = shards_of(settings)
    return plan_memory([math.ceil(unit / shards) * shards for unit in units], settings)
