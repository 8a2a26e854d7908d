"""Computes gradients of what comes before the first trained unit."""

SAYS = "expected gA gB fA -A fB bB -B rB"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    events = step_events(uses, (), reshard_after_forward, prefetch)
    return [(what, unit) for what, unit in events if what != "reduce" or unit not in frozen]
