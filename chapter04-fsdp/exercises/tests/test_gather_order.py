"""Task 2: short steps by hand, random ones against what a step may hold, and event by event."""

SHORT = {"g": "gather", "f": "forward", "b": "backward", "-": "free", "r": "reduce"}


def spelled(text):
    """The events of "gA fA -A"."""
    return [(SHORT[word[0]], word[1:]) for word in text.split()]


def short(events):
    letters = {what: letter for letter, what in SHORT.items()}
    return " ".join(f"{letters.get(what, what)}{unit}" for what, unit in events)


def random_step(chance):
    """(uses, frozen, reshard, prefetch): units that come twice, in a row and apart, or not."""
    names = [f"u{n}" for n in chance.permutation(20)[: chance.integers(1, 7)].tolist()]
    uses = list(names)
    for name in chance.choice(names, chance.integers(0, 4)).tolist():
        uses.insert(int(chance.integers(len(uses) + 1)), name)
    if chance.random() < 0.3:
        uses = [unit for unit in uses for _ in range(int(chance.integers(1, 3)))]
    share = float(chance.choice([0.0, 0.3, 0.7, 1.0], p=[0.4, 0.3, 0.2, 0.1]))
    frozen = {name for name in names if chance.random() < share} | {"unused"}
    return uses, frozen, bool(chance.random() < 0.65), int(chance.choice([0, 1, 1, 2, 3, 30]))


def told(uses, frozen, reshard, prefetch):
    return (
        f"uses {' '.join(uses)}; frozen {' '.join(sorted(frozen)) or 'none'}; "
        f"reshard_after_forward {reshard}, prefetch {prefetch}"
    )


def ordered(student, uses, frozen, reshard, prefetch):
    handed = list(uses), set(frozen)
    events = [tuple(event) for event in student.step_events(*handed, reshard, prefetch)]
    assert handed == (list(uses), set(frozen)), "step_events changed its arguments"
    return events


def assert_events(student, step, expected):
    got = ordered(student, *step)
    assert got == expected, (
        f"{told(*step)}: expected {short(expected)}; got {short(got)} (g gathers, f and b compute "
        "forward and backward, - frees, r reduces)"
    )


def test_steps_by_hand(student):
    for uses, frozen, reshard, prefetch, expected in (
        ("A", "", True, 0, "gA fA -A gA bA -A rA"),
        ("A", "", True, 1, "gA fA bA -A rA"),
        ("A", "", False, 0, "gA fA bA -A rA"),
        ("AB", "", True, 0, "gA fA -A gB fB -B gB bB -B rB gA bA -A rA"),
        ("AB", "", True, 1, "gA gB fA -A fB gA bB -B rB bA -A rA"),
        ("AB", "", False, 0, "gA fA gB fB bB -B rB bA -A rA"),
        ("AB", "", False, 1, "gA gB fA fB bB -B rB bA -A rA"),
        ("ABC", "", True, 1, "gA gB fA -A gC fB -B fC gB bC -C rC gA bB -B rB bA -A rA"),
        ("AA", "", True, 0, "gA fA -A gA fA -A gA bA -A gA bA -A rA"),
        ("AA", "", True, 1, "gA fA fA bA bA -A rA"),
        ("ABA", "", True, 0, "gA fA -A gB fB -B gA fA -A gA bA -A gB bB -B rB gA bA -A rA"),
        ("ABA", "", False, 0, "gA fA gB fB fA bA bB -B rB bA -A rA"),
        ("AB", "A", True, 1, "gA gB fA -A fB bB -B rB"),
        ("AB", "A", False, 0, "gA fA -A gB fB bB -B rB"),
        ("AB", "B", True, 1, "gA gB fA -A fB gA bB -B bA -A rA"),
        ("AB", "AB", True, 1, "gA gB fA -A fB -B"),
        ("AB", "ABC", False, 0, "gA fA -A gB fB -B"),
        ("", "A", True, 1, ""),
    ):
        assert_events(student, (list(uses), set(frozen), reshard, prefetch), spelled(expected))
    try:
        got = student.step_events(["A"], set(), True, -1)
    except ValueError:
        return
    raise AssertionError(f"prefetch -1: expected a ValueError, got {got}")


def test_every_unit_is_whole_when_it_computes(student, chance):
    for _ in range(60):
        step = uses, frozen, reshard, prefetch = random_step(chance)
        whole, reduced, computed = set(), [], []
        events = ordered(student, *step)
        for number, (what, unit) in enumerate(events):
            case = f"{told(*step)}: in {short(events[: number + 1])}, the last one"
            assert what in SHORT.values(), f"{case} is {what!r}"
            if what == "gather":
                assert unit not in whole, f"{case} gathers a unit that is whole"
                whole.add(unit)
                most = 1 + prefetch if reshard else len(uses)
                assert len(whole) <= most, f"{case} makes {len(whole)} units whole, of {most}"
            elif what == "free":
                assert unit in whole, f"{case} frees a unit that is not whole"
                whole.remove(unit)
            elif what == "reduce":
                assert unit not in frozen, f"{case} reduces a frozen unit"
                reduced.append(unit)
            else:
                assert unit in whole, f"{case} computes with a unit that is not whole"
                assert unit not in reduced, f"{case} adds to a gradient that was reduced"
                computed.append((what, unit))
        backward = [("backward", unit) for unit in uses[::-1]]
        while backward and backward[-1][1] in frozen:
            backward.pop()
        expected = [("forward", unit) for unit in uses] + backward
        assert computed == expected, (
            f"{told(*step)}: expected the computes {short(expected)}, got {short(computed)}"
        )
        assert not whole, f"{told(*step)}: {sorted(whole)} are whole at the end"
        trained = set(uses) - frozen
        assert sorted(reduced) == sorted(trained), f"{told(*step)}: {reduced} are reduced"
        if not reshard:
            gathers = sum(what == "gather" for what, _ in events)
            assert gathers == len(set(uses)), f"{told(*step)}: {gathers} gathers, {short(events)}"


def by_windows(uses, frozen, reshard, prefetch):
    """Each compute has a set of units that are whole; events are what tells two sets apart."""
    backward = list(uses[::-1])
    while backward and backward[-1] in frozen:
        backward.pop()
    order = [*uses, *backward]
    windows = [order[place : place + prefetch + 1] for place in range(len(order))]
    if not reshard:  # and all that were whole before, and will be used
        windows = [
            [*window, *(unit for unit in order[:place] if unit in order[place:])]
            for place, window in enumerate(windows)
        ]
    events = []
    before = []
    for place, window in enumerate(windows):
        came = [unit for unit in dict.fromkeys(window) if unit not in before]
        events += [("gather", unit) for unit in came]
        events.append(("backward" if place >= len(uses) else "forward", order[place]))
        after = windows[place + 1] if place + 1 < len(order) else []
        # what is in the next window and not in this one was not whole before
        if order[place] not in (after[:prefetch] if reshard else after):
            events.append(("free", order[place]))
        if place >= len(uses) and order[place] not in {*order[place + 1 :], *frozen}:
            events.append(("reduce", order[place]))
        before = [unit for unit in window if ("free", unit) not in events[-2:]]
    return events


def test_each_event_at_its_moment(student, chance):
    for _ in range(80):
        step = random_step(chance)
        assert_events(student, step, by_windows(*step))


def test_the_most_that_is_gathered_at_once(student, chance):
    sizes = {"A": 5, "B": 7, "C": 1}
    for events, expected, why in (
        ("", 0, "nothing is gathered"),
        ("gA fA -A", 5, "one unit"),
        ("gA fA -A gB fB -B", 7, "one after the other"),
        ("gA gB fA -A fB -B gC fC", 12, "two at once"),
        ("gA fA gB fB gC fC", 13, "none is freed"),
        ("gC fC -C gC gA bC -C rC bA -A rA", 6, "gathered again"),
    ):
        assert_most(student, spelled(events), sizes, expected, why)
    for _ in range(60):
        step = random_step(chance)
        events = by_windows(*step)[: int(chance.integers(1, 60))]
        units = sorted({*step[0], "unused"})
        sizes = dict(zip(units, chance.integers(0, 10**9, len(units)).tolist(), strict=True))
        assert_most(student, events, sizes, by_prefixes(events, sizes), told(*step))


def by_prefixes(events, sizes):
    """Of every beginning of the events: what is gathered more often than freed in it."""
    held = []
    for end in range(len(events) + 1):
        begun = events[:end]
        whole = {u for _, u in begun if begun.count(("gather", u)) > begun.count(("free", u))}
        held.append(sum(sizes[unit] for unit in whole))
    return max(held)


def assert_most(student, events, sizes, expected, why):
    handed = list(events), dict(sizes)
    got = student.most_gathered(*handed)
    assert handed == (list(events), sizes), "most_gathered changed its arguments"
    assert got == expected, (
        f"{short(events)} with bytes {sizes}: expected at most {expected} at once, got {got}: {why}"
    )
    assert type(got) is int, f"bytes are an int, not {type(got).__name__}"
