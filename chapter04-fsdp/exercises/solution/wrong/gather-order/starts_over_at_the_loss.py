"""Ends the prefetch with the forward pass, and frees all: backward begins with a gather."""

SAYS = "expected gA fA bA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    if not reshard_after_forward:
        return step_events(uses, frozen, False, prefetch)
    forward = step_events(uses, set(uses), True, prefetch)
    first = next((i for i, unit in enumerate(uses) if unit not in frozen), len(uses))
    alone = step_events(uses[first:][::-1], set(uses), True, prefetch)
    alone = [("backward" if what == "forward" else what, unit) for what, unit in alone]
    for unit in set(uses) - set(frozen):
        last = max(place for place, event in enumerate(alone) if event == ("free", unit))
        alone.insert(last + 1, ("reduce", unit))
    return forward + alone
