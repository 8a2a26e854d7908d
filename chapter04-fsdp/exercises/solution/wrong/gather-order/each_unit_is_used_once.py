"""Takes every unit's first use for its only one."""

SAYS = "expected gA fA -A gA fA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    return step_events(list(dict.fromkeys(uses)), frozen, reshard_after_forward, prefetch)
