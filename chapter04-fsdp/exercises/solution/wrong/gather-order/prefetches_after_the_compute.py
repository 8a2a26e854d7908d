"""Gathers the next units behind the compute, beside which they should have come."""

SAYS = "expected gA gB fA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    events = step_events(uses, frozen, reshard_after_forward, prefetch)
    for place in range(len(events) - 1, 0, -1):
        (what, unit), after = events[place - 1], events[place]
        if what == "gather" and after[0] in ("forward", "backward") and after[1] != unit:
            events[place - 1 : place + 1] = [after, (what, unit)]
    return events
