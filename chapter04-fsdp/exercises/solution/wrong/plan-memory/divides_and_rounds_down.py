"""Leaves the padding out: a shard is n // K."""

SAYS = "bytes of weights, got"


def plan_memory(units, settings):
    from plan_memory import plan_memory, shards_of

    shards = 1 if settings.mode == "none" else shards_of(settings)
    return plan_memory([unit // shards * shards for unit in units], settings)
