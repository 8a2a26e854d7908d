"""Without resharding frees all units at the end, also those that backward does not come to."""

SAYS = "expected"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    events = step_events(uses, frozen, reshard_after_forward, prefetch)
    if reshard_after_forward:
        return events
    freed = [event for event in events if event[0] == "free"]
    return [event for event in events if event[0] != "free"] + freed
