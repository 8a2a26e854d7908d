"""Task 3: models by hand, random ones by a walk through the step that adds and takes away."""

from dataclasses import dataclass, replace

MODES = ("full", "grad", "hybrid", "none")
KINDS = ("weights", "optimizer", "gradients", "gathered", "reducing")


@dataclass(frozen=True)
class Settings:
    mode: str
    ranks: int
    replicas: int = 1
    prefetch: int = 1
    weight: int = 4
    gradient: int = 4
    optimizer: int = 8
    gathered: int = 4
    reduced: int = 4


def random_model(chance):
    """(units, settings): few parameters, where padding is much, or so many that floats fail."""
    most = int(chance.choice([5, 30, 1000, 10**17]))
    units = chance.integers(1, most + 1, chance.integers(1, 8)).tolist()
    replicas = int(chance.integers(1, 5))
    mode = str(chance.choice(MODES, p=[0.35, 0.3, 0.25, 0.1]))
    ranks = int(chance.integers(1, 9))
    widths = chance.choice([0, 1, 2, 4, 8, 12], 5).tolist()
    ranks = ranks * replicas if mode == "hybrid" else ranks
    return units, Settings(mode, ranks, replicas, int(chance.integers(0, 4)), *widths)


def walk(units, s):
    """The bytes of each kind after every event of the step, forward and backward."""
    if s.mode == "none":
        whole = sum(units)
        sizes = (whole * s.weight, whole * s.optimizer, whole * s.gradient, 0, 0)
        return [dict(zip(KINDS, sizes, strict=True))]
    sharing = s.ranks // (s.replicas if s.mode == "hybrid" else 1)
    shard = [len(range(0, unit, sharing)) for unit in units]  # every so manieth parameter
    order = [*range(len(units)), *reversed(range(len(units)))]
    held = dict.fromkeys(KINDS, 0)
    held["weights"] = sum(size * s.weight for size in shard)
    held["optimizer"] = sum(size * s.optimizer for size in shard)
    moments, whole = [dict(held)], set()

    def note(kind, size):
        held[kind] += size
        moments.append(dict(held))

    for place, unit in enumerate(order):
        window = order[place : place + s.prefetch + 1]
        for late in sorted({*window} - whole):
            whole.add(late)
            note("gathered", sharing * shard[late] * s.gathered)
        backward = place >= len(units)
        if backward:
            note("reducing", sharing * shard[unit] * s.reduced)
        if backward or (s.mode != "grad" and unit not in window[1:]):
            whole.remove(unit)
            note("gathered", -sharing * shard[unit] * s.gathered)
        if backward:
            note("gradients", shard[unit] * s.gradient)
            note("reducing", -sharing * shard[unit] * s.reduced)
    return moments


def by_walking(units, settings):
    moments = walk(units, settings)
    most = {kind: max(moment[kind] for moment in moments) for kind in KINDS}
    return most | {"peak": max(sum(moment.values()) for moment in moments)}


def planned(student, units, settings):
    handed = list(units)
    plan = student.plan_memory(handed, settings)
    assert handed == list(units), "plan_memory changed the list of units"
    case = f"units of {list(units)}; {settings}"
    assert sorted(plan) == sorted([*KINDS, "peak"]), f"{case}: the kinds are {sorted(plan)}"
    for kind, size in plan.items():
        assert type(size) is int, f"{case}: {kind} is {size!r}, no int"
    return dict(plan)


def assert_kinds(student, units, settings, expected, why=""):
    plan = planned(student, units, settings)
    for kind, size in expected.items():
        assert plan[kind] == size, (
            f"units of {list(units)}; {settings}: expected {size} bytes of {kind}, got "
            f"{plan[kind]}{': ' if why else ''}{why}"
        )


def only(plan, *kinds):
    return {kind: plan[kind] for kind in kinds}


def test_what_is_held_from_step_to_step(student, chance):
    kinds = ("weights", "optimizer", "gradients")
    for units, mode, ranks, expected, why in (
        ([8, 12], "full", 4, (20, 40, 20), "2 and 3 parameters in the shards"),
        ([8, 12], "grad", 4, (20, 40, 20), "2 and 3 parameters in the shards"),
        ([8, 12], "none", 4, (80, 160, 80), "every rank has all"),
        ([8, 12], "hybrid", 4, (40, 80, 40), "2 ranks share a copy: 4 and 6"),
        ([7, 9], "full", 4, (20, 40, 20), "each unit is padded by itself"),
        ([7, 9], "none", 4, (64, 128, 64), "nothing is padded"),
        ([1, 1, 1], "full", 8, (12, 24, 12), "a shard of each, though most are padding"),
    ):
        held = dict(zip(kinds, expected, strict=True))
        assert_kinds(student, units, Settings(mode, ranks, replicas=2), held, why)
    for mode in MODES:
        nothing = dict.fromkeys([*KINDS, "peak"], 0)
        assert_kinds(student, [], Settings(mode, 4), nothing, "no unit")
    for _ in range(40):
        units, settings = random_model(chance)
        assert_kinds(student, units, settings, only(by_walking(units, settings), *kinds))
    for wrong in (
        Settings("zero", 4), Settings("full", 0), Settings("full", 4, prefetch=-1),
        Settings("none", 0), Settings("hybrid", 4, replicas=3), Settings("hybrid", 4, replicas=0),
        Settings("hybrid", 4, replicas=8), Settings("hybrid", 0, replicas=1),
        Settings("hybrid", 4, replicas=-2), Settings("none", 4, prefetch=-1), Settings("", 4),
    ):  # fmt: skip
        try:
            got = student.plan_memory([8, 12], wrong)
        except ValueError:
            continue
        raise AssertionError(f"{wrong}: expected a ValueError, got {got}")
    for mode in ("full", "grad", "none"):  # these do not look at replicas
        for replicas in (3, 0):
            settings = Settings(mode, 4, replicas=replicas)
            assert_kinds(student, [8, 12], settings, by_walking([8, 12], settings))


def test_what_is_whole_for_a_while(student, chance):
    for units, mode, prefetch, gathered, reducing, why in (
        ([8, 12, 4], "full", 0, 48, 48, "one unit at once, at most that of 12"),
        ([8, 12, 4], "full", 1, 80, 48, "two neighbours, of 8 and 12"),
        ([8, 12, 4], "full", 2, 96, 48, "all three"),
        ([8, 12, 4], "full", 9, 96, 48, "all three, and not more than there are"),
        ([8, 12, 4], "grad", 0, 96, 48, "all, at the end of forward"),
        ([8, 12, 4], "none", 1, 0, 0, "nothing is gathered, nor reduced elsewhere"),
        ([7, 9, 1], "full", 1, 80, 48, "whole units have their padding"),
        ([12, 1, 12], "full", 1, 64, 48, "12 and 1 with padding: the two of 12 are no neighbours"),
        ([5], "full", 1, 32, 32, "one unit, in backward too"),
    ):
        held = {"gathered": gathered, "reducing": reducing}
        assert_kinds(student, units, Settings(mode, 4, prefetch=prefetch), held, why)
    bf16 = Settings("hybrid", 4, replicas=2, gathered=2, reduced=4)
    held = {"gathered": 36, "reducing": 40}
    assert_kinds(student, [7, 9], bf16, held, "of 2 bytes gathered, of 4 reduced, on 2 ranks")
    for _ in range(60):
        units, settings = random_model(chance)
        expected = only(by_walking(units, settings), "gathered", "reducing")
        assert_kinds(student, units, settings, expected)


def test_the_peak_is_a_moment_of_the_step(student, chance):
    for units, mode, prefetch, expected, why in (
        # weights and optimizer: 12 bytes of each parameter in a shard
        ([8], "full", 1, 24 + 32 + 32, "in backward: whole, with its gradient"),
        ([8, 12], "full", 1, 60 + 80 + 48, "in the last unit's backward"),
        ([12, 8], "full", 0, 60 + 48 + 48 + 8, "in the first unit's backward, beside a shard's"),
        ([8, 12, 4], "full", 1, 72 + 80 + 48 + 4, "in the middle"),
        ([8, 12, 4], "grad", 1, 72 + 80 + 48 + 4, "the last unit is free by then"),
        ([4, 4, 4], "grad", 1, 36 + 48 + 16, "all whole, when backward begins"),
        ([8, 12], "none", 1, 320, "at every moment"),
    ):
        settings = Settings(mode, 4, prefetch=prefetch)
        assert_kinds(student, units, settings, {"peak": expected}, why)
    thin = Settings("full", 1, gathered=1, reduced=2)
    peak = {"peak": 120 + 40 + 20}
    assert_kinds(student, [10], thin, peak, "in the reduction: whole and reduced, side by side")
    free = Settings("full", 4, prefetch=0, gathered=0, reduced=0)
    assert_kinds(student, [8, 8], free, {"peak": 64}, "in the optimizer's step")
    for _ in range(120):
        units, settings = random_model(chance)
        assert_kinds(student, units, settings, only(by_walking(units, settings), "peak"))


def test_the_fewest_ranks_that_suffice(student, chance):
    ten = Settings("full", 99)
    # peaks of one unit of 10 on 1, 2, … ranks: 200, 140, 144, 132, 104, 120, 136, 152, 168, 92
    for budget, most, expected in (
        (200, 10, 1), (199, 10, 2), (139, 10, 4), (131, 10, 5), (104, 10, 5), (103, 10, 10),
        (103, 9, None), (104, 4, None), (104, 5, 5), (199, 1, None), (91, 10, None), (0, 10, None),
    ):  # fmt: skip
        assert_fewest(student, [10], ten, budget, most, expected)
    for _ in range(60):
        units, settings = random_model(chance)
        most = int(chance.integers(1, 20))
        settings = replace(settings, ranks=int(chance.choice([settings.ranks, most + 7])))
        step = settings.replicas if settings.mode == "hybrid" else 1
        peaks = {
            ranks: by_walking(units, replace(settings, ranks=ranks))["peak"]
            for ranks in range(1, most + 1) if ranks % step == 0
        }  # fmt: skip
        some = [*peaks.values(), 0]
        budget = int(chance.choice(some)) + int(chance.integers(-1, 2))
        enough = [ranks for ranks, peak in peaks.items() if peak <= budget]
        assert_fewest(student, units, settings, budget, most, min(enough, default=None))


def assert_fewest(student, units, settings, budget, most, expected):
    handed, kept = list(units), vars(settings).copy()
    got = student.fewest_ranks(handed, settings, budget, most)
    assert handed == list(units), "fewest_ranks changed the list of units"
    assert vars(settings) == kept, "fewest_ranks changed the settings"
    assert got == expected, (
        f"units of {units}; {settings}; {budget} bytes, at most {most} ranks: expected {expected} "
        f"ranks, got {got}"
    )
    assert got is None or type(got) is int, f"ranks are an int, not {type(got).__name__}"
