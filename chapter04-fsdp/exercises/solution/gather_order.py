"""Task 2, gather-order: the reference solution."""


def step_events(uses, frozen, reshard_after_forward, prefetch):
    if prefetch < 0:
        raise ValueError(f"nothing is gathered {prefetch} computes ahead; use 0 or more")
    first = next((i for i, unit in enumerate(uses) if unit not in frozen), len(uses))
    computes = [("forward", unit) for unit in uses]
    computes += [("backward", unit) for unit in reversed(uses[first:])]
    order = [unit for _, unit in computes]
    events, whole = [], set()
    for place, (what, unit) in enumerate(computes):
        coming = order[place + 1 : place + 1 + prefetch]
        for needed in (unit, *coming):
            if needed not in whole:
                whole.add(needed)
                events.append(("gather", needed))
        events.append((what, unit))
        is_last = unit not in order[place + 1 :]
        if is_last or (reshard_after_forward and unit not in coming):
            whole.remove(unit)
            events.append(("free", unit))
        if is_last and unit not in frozen:
            events.append(("reduce", unit))
    return events


def most_gathered(events, sizes):
    now = most = 0
    for what, unit in events:
        now += sizes[unit] * ((what == "gather") - (what == "free"))
        most = max(most, now)
    return most
