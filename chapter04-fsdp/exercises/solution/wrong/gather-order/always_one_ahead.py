"""Prefetches one unit whatever the depth."""

SAYS = "expected gA fA -A gA bA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    step_events(uses, frozen, reshard_after_forward, prefetch)
    return step_events(uses, frozen, reshard_after_forward, 1)
