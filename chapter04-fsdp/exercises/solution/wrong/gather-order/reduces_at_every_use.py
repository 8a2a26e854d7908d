"""A unit that is used twice sends its gradient twice, the first time half of it."""

SAYS = "rA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    found = []
    events = step_events(uses, frozen, reshard_after_forward, prefetch)
    for event in events:
        if event[0] != "reduce":
            found.append(event)
        if event[0] == "backward" and event[1] not in frozen:
            found.append(("reduce", event[1]))
    return found
