"""No prefetch: a unit is gathered when its compute has come."""

SAYS = "expected gA fA bA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    return step_events(uses, frozen, reshard_after_forward, min(prefetch, 0))
