"""Task 4: every element is followed from its place in stage 2 to that in stage 3."""

import math

import numpy as np
from grader_parts import migrated

DTYPES = (np.float32, np.float16, np.float64, np.int64, np.uint16, ">f4", np.complex64)


def random_worlds(chance):
    """(sizes, sources, targets): few elements or many, also fewer than ranks, also none."""
    most = int(chance.choice([2, 10, 40]))
    sizes = chance.integers(0, most + 1, chance.integers(0, 7)).tolist()
    sources, targets = chance.integers(1, int(chance.choice([4, 8])), 2).tolist()
    return sizes, sources, int(chance.choice([sources, targets, targets, 2 * sources]))


def by_elements(sizes, sources, targets):
    """Of each target, the copies of single elements, where both are neighbours put together."""
    have, place = math.ceil(sum(sizes) / sources), 0
    copies = [[] for _ in range(targets)]
    for number, size in enumerate(sizes):
        want = math.ceil(size / targets)
        for element in range(size):
            source, offset = divmod(place, have)
            own, there = copies[element // want], element % want
            if own and (own[-1][0], own[-1][3]) == (source, number):
                own[-1] = (*own[-1][:2], offset + 1, *own[-1][3:])
            else:
                own.append((source, offset, offset + 1, number, there))
            place += 1
    return copies


def told(sizes, sources, targets):
    return f"parameters of {sizes} from {sources} ranks to {targets}"


def assert_copies(student, target, worlds, expected):
    handed = list(worlds[0])
    got = [tuple(copy) for copy in student.copies_to(target, handed, *worlds[1:])]
    case = f"{told(*worlds)}, target rank {target}"
    assert handed == worlds[0], f"{case}: copies_to changed the sizes"
    assert got == expected, f"{case}: expected the copies {expected}, got {got}"
    assert all(type(n) is int for copy in got for n in copy), f"{case}: {got} are no ints"


def refused(function, arguments, why):
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{why}: expected a ValueError, got {got!r:.200}")


def test_what_one_rank_needs(student, chance):
    for target, worlds, expected in (
        (0, ([4, 4], 2, 2), [(0, 0, 2, 0, 0), (1, 0, 2, 1, 0)]),
        (1, ([4, 4], 2, 2), [(0, 2, 4, 0, 0), (1, 2, 4, 1, 0)]),
        (0, ([8], 4, 2), [(0, 0, 2, 0, 0), (1, 0, 2, 0, 2)]),
        (1, ([8], 2, 4), [(0, 2, 4, 0, 0)]),
        (0, ([6, 6], 2, 1), [(0, 0, 6, 0, 0), (1, 0, 6, 1, 0)]),
        (0, ([3, 3], 3, 2), [(0, 0, 2, 0, 0), (1, 1, 2, 1, 0), (2, 0, 1, 1, 1)]),
        (1, ([3, 3], 3, 2), [(1, 0, 1, 0, 0), (2, 1, 2, 1, 0)]),
        (2, ([5], 2, 4), [(1, 1, 2, 0, 0)]),
        (3, ([5, 1, 4], 2, 4), [(1, 4, 5, 2, 0)]),
        (0, ([0, 2, 0, 1], 1, 1), [(0, 0, 2, 1, 0), (0, 2, 3, 3, 0)]),
        (1, ([1, 1], 2, 2), []),
        (0, ([], 3, 2), []),
    ):
        assert_copies(student, target, worlds, expected)
    for _ in range(60):
        worlds = random_worlds(chance)
        target = int(chance.integers(worlds[2]))
        assert_copies(student, target, worlds, by_elements(*worlds)[target])
    for target in (-1, 2, 3):
        refused(student.copies_to, (target, [10], 3, 2), f"rank {target} of 2")
        refused(student.copies_to, (target, [], 3, 2), f"rank {target} of 2, of no parameter")
    for worlds in (([10], 0, 2), ([10], -1, 2), ([10], 2, 0), ([10, -1], 2, 2), ([-3], 2, 2)):
        refused(student.copies_to, (0, *worlds), told(*worlds))


def test_every_element_once_and_few_copies(student, chance):
    for _ in range(40):
        sizes, sources, targets = worlds = random_worlds(chance)
        have = math.ceil(sum(sizes) / sources)
        taken = np.zeros(sources * have, int)
        given = [np.zeros(targets * math.ceil(size / targets), int) for size in sizes]
        count = 0
        for target in range(targets):
            for source, begin, end, number, there in student.copies_to(target, *worlds):
                first = target * (len(given[number]) // targets) + there
                taken[source * have + begin : source * have + end] += 1
                given[number][first : first + end - begin] += 1
                count += 1
        case = told(*worlds)
        assert (taken[: sum(sizes)] == 1).all(), f"{case}: taken {taken.tolist()} times"
        assert not taken[sum(sizes) :].any(), f"{case}: padding is taken, {taken.tolist()}"
        for size, times in zip(sizes, given, strict=True):
            assert (times[:size] == 1).all(), f"{case}: of {size} put {times.tolist()} times"
            assert not times[size:].any(), f"{case}: put into padding, {times.tolist()}"
        fewest = sum(map(len, by_elements(*worlds)))
        assert count == fewest, f"{case}: {count} copies, {fewest} are enough"


def test_models_too_large_to_count(student, chance):
    for number in range(20):  # too large for floats, and for whoever goes through all ranks
        sizes = chance.integers(10**15, 10**17, 5).tolist()
        fewest = 2 if number % 2 else 10**9
        sources, targets = chance.integers(fewest, 10 * fewest, 2).tolist()
        have, begins = -(-sum(sizes) // sources), [sum(sizes[:n]) for n in range(5)]
        for target in {0, int(chance.integers(targets)), targets - 1}:
            case = f"{told(sizes, sources, targets)}, target rank {target}"
            copies = [tuple(copy) for copy in student.copies_to(target, sizes, sources, targets)]
            assert copies == sorted(copies, key=lambda copy: copy[3:]), (
                f"{case}: {copies}, unsorted"
            )
            for parameter, size in enumerate(sizes):
                want = -(-size // targets)
                own = [copy for copy in copies if copy[3] == parameter]
                length = max(0, min(size, (target + 1) * want) - target * want)
                assert sum(end - begin for _, begin, end, _, _ in own) == length, (
                    f"{case}: expected {length} elements of parameter {parameter}, got {own}"
                )
                assert len({copy[0] for copy in own}) == len(own), f"{case}: {own}, in pieces"
                at = begins[parameter] + target * want
                for source, begin, end, _, there in own:
                    assert source * have + begin == at + there and 0 <= begin < end <= have, (
                        f"{case}: {(source, begin, end, parameter, there)} is in the wrong place"
                    )


def test_migrated_partitions(student, chance):
    for case_number in range(50):
        sizes, sources, targets = worlds = random_worlds(chance)
        dtype = np.dtype(DTYPES[case_number % len(DTYPES)])
        width, n = dtype.itemsize, sum(sizes)
        have = math.ceil(n / sources)
        content = chance.bytes(n * width)
        padded = content + b"\x7f" * ((sources * have - n) * width)  # what is no one's
        partitions = [
            np.frombuffer(padded[rank * have * width :][: have * width], dtype).copy()
            for rank in range(sources)
        ]
        kept = [one.tobytes() for one in partitions]
        case = f"{told(*worlds)}, {dtype}"
        handed = list(sizes)
        found, shared, locked = migrated(student.migrate, partitions, handed, targets)
        assert handed == sizes, f"{case}: migrate changed the sizes"
        assert [one.tobytes() for one in partitions] == kept, f"{case}: partitions are changed"
        assert [len(rank) for rank in found] == [len(sizes)] * targets, (
            f"{case}: {[len(rank) for rank in found]} arrays came back"
        )
        begin = 0
        for number, size in enumerate(sizes):
            want = math.ceil(size / targets)
            own = content[begin * width : (begin + size) * width].ljust(
                want * targets * width, b"\0"
            )
            for rank in range(targets):
                got = found[rank][number]
                expected = np.frombuffer(own[rank * want * width :][: want * width], dtype)
                assert (got.shape, got.dtype) == ((want,), dtype), (
                    f"{case}: rank {rank} has {got.shape} {got.dtype} of parameter {number}"
                )
                assert got.tobytes() == expected.tobytes(), (
                    f"{case}: rank {rank} has {got.tolist()!r:.200} of parameter {number}, "
                    f"expected {expected.tolist()!r:.200}"
                )
            begin += size
        assert not shared, f"{case}: an array shares memory with a partition or another array"
        assert not locked, f"{case}: an array cannot be written to"
    three, two = np.ones(3, np.float32), np.ones(2, np.float32)
    for partitions, sizes, targets, why in (
        ([three, two], [5], 2, "partitions of 3 and 2 elements"),
        ([three, two], [4], 2, "partitions of 3 and 2 elements, for 4"),
        ([three, two, three], [8], 2, "a partition of 2 between two of 3"),
        ([two, two], [2, 3], 2, "partitions of 2, for 5"),
        ([three, three], [2, 2], 2, "partitions of 3, for 4"),
        ([three, three.astype(np.float64), three], [9], 2, "float64 between float32"),
        ([three.reshape(3, 1)] * 2, [6], 3, "partitions of two dimensions"),
        ([], [], 2, "no partitions"),
        ([two, two], [0], 2, "partitions of 2, for nothing"),
        ([np.ones((1, 1), np.float32)] * 2, [2], 1, "partitions of 1 x 1"),
        ([three], [3], 0, "no targets"),
        ([three], [3], -1, "no targets"),
        ([three], [4, -1], 1, "a negative size"),
    ):
        refused(student.migrate, (partitions, sizes, targets), why)
