"""The reduction's buffer is taken while the weights are still whole."""

SAYS = "expected gA fA -A gA bA -A rA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    events = step_events(uses, frozen, reshard_after_forward, prefetch)
    for place in range(1, len(events)):
        if events[place][0] == "reduce":
            events[place - 1 : place + 1] = events[place], events[place - 1]
    return events
