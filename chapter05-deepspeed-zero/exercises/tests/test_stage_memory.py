"""Task 3: models by hand and published, random ones rank by rank and element by element."""

from dataclasses import dataclass, replace

KINDS = ("device", "host", "file")
BILLION = 10**9


@dataclass(frozen=True)
class Settings:
    stage: int
    ranks: int
    precision: str = "mixed"
    offload: str = "none"
    buffers: int = 0


def kept_by_a_rank(sizes, s):
    """(device, host, file): what the first rank keeps of each group that is padded by itself."""
    weight, gradient, optimizer = {"fp32": (4, 4, 8), "mixed": (2, 2, 12)}[s.precision]
    groups = sizes if s.stage == 3 else [sum(sizes)]
    device = host = file = largest = 0
    for size in groups:
        own = (size + s.ranks - 1) // s.ranks
        every = size if s.stage == 0 else own * s.ranks
        device += weight * (own if s.stage == 3 else every)
        in_device = gradient * (own if s.stage >= 2 else every)
        state = optimizer * (own if s.stage >= 1 else every)
        largest = max(largest, state)
        if s.offload == "none":
            device += in_device + state
            continue
        device += in_device if s.stage == 1 else 0
        host += gradient * own
        if s.offload == "cpu":
            host += state
        else:
            file += state
    return device, host + (s.buffers * largest if s.offload == "nvme" else 0), file


def random_settings(chance):
    stage = int(chance.integers(0, 4))
    offloads = ["none"] + ["cpu"] * (stage > 0) + ["nvme"] * (stage == 3)
    offload = str(chance.choice(offloads))
    precision = str(chance.choice(["fp32", "mixed"]))
    buffers = int(chance.integers(1, 6)) if offload == "nvme" else int(chance.integers(-1, 3))
    return Settings(stage, int(chance.integers(1, 10)), precision, offload, buffers)


def random_sizes(chance):
    """Few elements, where padding is much, or so many that floats fail."""
    most = int(chance.choice([3, 30, 1000, 10**17]))
    return chance.integers(0, most + 1, chance.integers(1, 9)).tolist()


def assert_kept(student, sizes, settings, expected, why=""):
    handed = list(sizes)
    got = dict(student.stage_memory(handed, settings))
    case = f"parameters of {list(sizes)}; {settings}"
    assert handed == list(sizes), f"{case}: stage_memory changed the sizes"
    assert sorted(got) == sorted(KINDS), f"{case}: the kinds are {sorted(got)}"
    for kind, size in zip(KINDS, expected, strict=True):
        assert got[kind] == size, (
            f"{case}: expected {size} bytes of {kind}, got {got[kind]}{': ' if why else ''}{why}"
        )
        assert type(got[kind]) is int, f"{case}: {kind} is {got[kind]!r}, no int"


def test_published_numbers(student, chance):
    # Rajbhandari et al., arXiv 1910.02054, figure 1 and table 1: GB of stages 0 to 3
    for billions, ranks, *published in (
        (7.5, 64, "120", "31.4", "16.6", "1.88"),
        (7.5, 4, "120", "52.5", "41.3", "30"),
        (7.5, 16, "120", "35.6", "21.6", "7.5"),
        (7.5, 1024, "120", "30.1", "15.1", "0.12"),
        (128, 64, "2048", "536", "284", "32"),
    ):
        for stage, told in enumerate(published):
            settings = Settings(stage, ranks)
            kept = student.stage_memory([int(billions * BILLION)], settings)
            step = 10.0 ** -len(told.partition(".")[2])
            assert abs(kept["device"] / BILLION - float(told)) <= 0.501 * step, (
                f"{billions} billion parameters; {settings}: published are {told} GB, got "
                f"{kept['device'] / BILLION} GB"
            )
    # Ren et al., arXiv 2101.06840: 2 of 16 bytes per parameter stay on the device, 14 leave it
    settings = Settings(2, 1, offload="cpu")
    expected = (20 * BILLION, 140 * BILLION, 0)
    assert_kept(student, [10 * BILLION], settings, expected, "ZeRO-Offload, 10 billion parameters")


def test_stages_and_padding(student, chance):
    for sizes, stage, ranks, precision, device, why in (
        ([8, 12], 0, 4, "fp32", 20 * 16, "every rank has all"),
        ([8, 12], 1, 4, "fp32", 20 * 8 + 5 * 8, "a quarter of the optimizer's"),
        ([8, 12], 2, 4, "fp32", 20 * 4 + 5 * 12, "and of the gradients'"),
        ([8, 12], 3, 4, "fp32", 5 * 16, "and of the weights'"),
        ([8, 12], 1, 4, "mixed", 20 * 4 + 5 * 12, "2 and 2 bytes, and a quarter of 12"),
        ([7, 11], 0, 4, "mixed", 18 * 16, "nothing is padded"),
        ([7, 11], 1, 4, "mixed", 20 * 4 + 5 * 12, "18 are padded to 20"),
        ([7, 11], 2, 4, "mixed", 20 * 2 + 5 * 14, "18 are padded to 20"),
        ([7, 9], 2, 4, "mixed", 16 * 2 + 4 * 14, "16 need no padding"),
        ([7, 9], 3, 4, "mixed", 5 * 16, "2 and 3: each is padded alone"),
        ([1, 1, 1], 3, 8, "mixed", 3 * 16, "one of each, though most of it is padding"),
        ([1, 1, 1], 2, 8, "mixed", 8 * 2 + 14, "one of all"),
        ([], 1, 3, "fp32", 0, "no parameter"),
        ([], 3, 3, "fp32", 0, "no parameter"),
    ):
        settings = Settings(stage, ranks, precision)
        assert_kept(student, sizes, settings, (device, 0, 0), why)
    for _ in range(80):
        sizes, settings = random_sizes(chance), replace(random_settings(chance), offload="none")
        assert_kept(student, sizes, settings, kept_by_a_rank(sizes, settings))
    for wrong in (
        Settings(4, 2), Settings(-1, 2), Settings(1, 0), Settings(0, -1), Settings(1, 2, "fp16"),
        Settings(1, 2, ""),
    ):  # fmt: skip
        refused(student.stage_memory, ([8], wrong), str(wrong))
        refused(student.stage_memory, ([], wrong), f"{wrong}, no parameter")
        refused(student.largest_model, (wrong, 1, 99, 99, 99), str(wrong))


def test_what_is_offloaded(student, chance):
    for sizes, settings, expected, why in (
        ([20], Settings(1, 4, "mixed", "cpu"), (80, 70, 0), "whole gradients stay, a part is read"),
        ([20], Settings(2, 4, "mixed", "cpu"), (40, 70, 0), "weights only"),
        ([20], Settings(3, 4, "mixed", "cpu"), (10, 70, 0), "a part of the weights"),
        ([20], Settings(2, 4, "fp32", "cpu"), (80, 60, 0), "gradients of 4 bytes, moments of 8"),
        ([18], Settings(1, 4, "mixed", "cpu"), (80, 70, 0), "with padding"),
        ([7, 9], Settings(3, 4, "mixed", "cpu"), (10, 70, 0), "2 and 3"),
        ([20], Settings(3, 4, "mixed", "nvme", 1), (10, 70, 60), "one buffer of all"),
        ([8, 12], Settings(3, 4, "mixed", "nvme", 2), (10, 10 + 72, 60), "two buffers of 3"),
        ([8, 12], Settings(3, 4, "fp32", "nvme", 4), (20, 20 + 96, 40), "four buffers of 3"),
        (
            [12, 7],
            Settings(3, 4, "mixed", "nvme", 2),
            (10, 10 + 72, 60),
            "the largest is the first",
        ),
        ([], Settings(3, 4, "mixed", "nvme", 2), (0, 0, 0), "no parameter"),
        (
            [10**17 + 1, 10**17],
            Settings(3, 1, "mixed", "nvme", 1),
            (4 * 10**17 + 2, 16 * 10**17 + 14, 24 * 10**17 + 12),
            "exact",
        ),
    ):
        assert_kept(student, sizes, settings, expected, why)
    for _ in range(100):
        sizes, settings = random_sizes(chance), random_settings(chance)
        assert_kept(student, sizes, settings, kept_by_a_rank(sizes, settings))
    for wrong in (
        Settings(0, 2, "mixed", "cpu"), Settings(0, 2, "mixed", "nvme", 4),
        Settings(2, 2, "mixed", "disk"), Settings(0, 2, "fp32", ""),
        Settings(1, 2, "mixed", "nvme", 4), Settings(2, 2, "mixed", "nvme", 4),
        Settings(3, 2, "mixed", "nvme", 0), Settings(3, 2, "mixed", "nvme", -1),
    ):  # fmt: skip
        refused(student.stage_memory, ([8], wrong), str(wrong))
        refused(student.stage_memory, ([], wrong), f"{wrong}, no parameter")
        refused(student.largest_model, (wrong, 1, 99, 99, 99), str(wrong))


def test_the_largest_model_that_fits(student, chance):
    endless = 10**30
    for settings, parameters, budgets, expected, why in (
        (Settings(0, 8), 1, (160, 0, 0), 10, "16 bytes each"),
        (Settings(0, 8), 1, (159, 0, 0), 9, "a byte too few"),
        (Settings(0, 8), 3, (160, 0, 0), 3, "three of 3 are 144"),
        (Settings(3, 8), 1, (160, 0, 0), 80, "a part of 10"),
        (Settings(3, 8), 3, (160, 0, 0), 24, "three parts of 3, each of up to 24 elements"),
        (Settings(3, 8), 3, (47, 0, 0), 0, "three parts of 1 need 48"),
        (Settings(2, 8), 3, (160, 0, 0), 13, "39 elements are padded to 40"),
        (Settings(1, 2, "mixed", "cpu"), 1, (80, 140, 0), 20, "both are full"),
        (Settings(1, 2, "mixed", "cpu"), 1, (endless, 140, 0), 20, "the host is full"),
        (Settings(1, 2, "mixed", "cpu"), 1, (80, endless, 0), 20, "the device is full"),
        (Settings(3, 2, "mixed", "nvme", 1), 2, (endless, endless, 120), 10, "the file is full"),
        (Settings(3, 2, "mixed", "nvme", 1), 2, (80, 80, 0), 0, "no room for a file"),
        (Settings(2, 1), 1, (0, 0, 0), 0, "no room"),
        (Settings(0, 1), 1, (16 * 10**18 - 1, 0, 0), 10**18 - 1, "10**18, but for a byte"),
    ):
        assert_largest(student, settings, parameters, budgets, expected, why)
    for _ in range(80):
        settings, parameters = random_settings(chance), int(chance.integers(1, 6))
        size = int(chance.integers(0, int(chance.choice([4, 100, 10**15]))))
        kept = kept_by_a_rank([size] * parameters, settings)
        room = [int(chance.choice([0, 0, 1, 50, endless])) for _ in KINDS]
        budgets = [one + more for one, more in zip(kept, room, strict=True)]
        if min(room[: 1 if settings.offload == "none" else 2]) == endless:
            budgets[0] = kept[0]
        expected = last_that_fits(settings, parameters, budgets, size)
        assert_largest(student, settings, parameters, budgets, expected)
    refused(student.largest_model, (Settings(1, 2), 0, 99, 99, 99), "no parameters")
    refused(student.largest_model, (Settings(1, 2), -2, 99, 99, 99), "-2 parameters")
    refused(student.largest_model, (Settings(0, 2, "mixed", "cpu"), 1, 0, 0, 0), "cpu in stage 0")
    refused(student.largest_model, (Settings(4, 2), 1, 99, 99, 99), "stage 4")


def last_that_fits(settings, parameters, budgets, size):
    """From a size that fits on, by steps that become smaller."""
    for step in (16**power for power in range(30, -1, -1)):
        while all(
            kept <= budget
            for kept, budget in zip(
                kept_by_a_rank([size + step] * parameters, settings), budgets, strict=True
            )
        ):
            size += step
    return size


def assert_largest(student, settings, parameters, budgets, expected, why=""):
    kept = vars(settings).copy()
    got = student.largest_model(settings, parameters, *budgets)
    case = f"{parameters} parameters in {dict(zip(KINDS, budgets, strict=True))}; {settings}"
    assert vars(settings) == kept, f"{case}: largest_model changed the settings"
    assert got == expected, (
        f"{case}: expected {expected} elements in each, got {got}{': ' if why else ''}{why}"
    )
    assert type(got) is int, f"{case}: {got!r} is no int"


def refused(function, arguments, why):
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{why}: expected a ValueError, got {got!r:.200}")
