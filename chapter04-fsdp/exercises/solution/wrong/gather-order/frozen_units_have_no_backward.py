"""Leaves frozen units out of the backward pass: no gradient comes to those below them."""

SAYS = "expected gA gB fA -A fB gA bB -B bA -A rA"


def step_events(uses, frozen, reshard_after_forward, prefetch):
    from gather_order import step_events

    events = step_events(uses, frozen, reshard_after_forward, prefetch)
    return [(what, unit) for what, unit in events if what != "backward" or unit not in frozen]
