"""Frees every unit behind its compute, also one that the next compute needs."""

SAYS = "expected gA fA bA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    if reshard_after_forward:
        events = step_events(uses, frozen, True, prefetch)
        found = []
        for place, event in enumerate(events):
            found.append(event)
            computes = event[0] in ("forward", "backward")
            if computes and events[place + 1 : place + 2] != [("free", event[1])]:
                found += [("free", event[1]), ("gather", event[1])]
        return found
    return step_events(uses, frozen, False, prefetch)
