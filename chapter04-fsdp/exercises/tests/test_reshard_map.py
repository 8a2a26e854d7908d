"""Task 4: every element is followed from its old place to its new one."""

import math

import numpy as np
from grader_memory import made_of

DTYPES = (np.float32, np.float16, np.float64, np.int64, np.uint16)


def random_worlds(chance):
    """(size, sources, targets): few elements or many, also fewer than ranks; worlds that divide."""
    size = int(chance.choice([0, 1, *chance.integers(2, [10, 100], 2).tolist() * 3]))
    sources, targets = chance.integers(1, int(chance.choice([4, 9, 20])), 2).tolist()
    if chance.random() < 0.3:
        targets = int(chance.choice([sources, 2 * sources, max(1, sources // 2)]))
    return size, sources, targets


def by_elements(size, sources, targets):
    """The copies of single elements, and those together that have both neighbours in common."""
    have, want = math.ceil(size / sources), math.ceil(size / targets)
    copies = []
    for element in range(size):
        source, target = element // have, element // want
        if copies and (copies[-1][0], copies[-1][2]) == (source, target):
            copies[-1] = (*copies[-1][:4], copies[-1][4] + 1)
        else:
            copies.append((source, element % have, target, element % want, 1))
    return copies


def told(size, sources, targets):
    return f"{size} elements from {sources} ranks to {targets}"


def assert_copies(student, target, worlds, expected):
    got = [tuple(copy) for copy in student.copies_to(target, *worlds)]
    case = f"{told(*worlds)}, target rank {target}"
    assert got == expected, f"{case}: expected the copies {expected}, got {got}"
    assert all(type(n) is int for copy in got for n in copy), f"{case}: {got} are no ints"


def test_what_one_rank_needs(student, chance):
    for target, worlds, expected in (
        (0, (12, 4, 2), [(0, 0, 0, 3), (1, 0, 3, 3)]),
        (1, (12, 4, 2), [(2, 0, 0, 3), (3, 0, 3, 3)]),
        (1, (12, 2, 4), [(0, 3, 0, 3)]),
        (1, (12, 3, 3), [(1, 0, 0, 4)]),
        (1, (10, 3, 2), [(1, 1, 0, 3), (2, 0, 3, 2)]),
        (2, (10, 2, 3), [(1, 3, 0, 2)]),
        (3, (10, 1, 4), [(0, 9, 0, 1)]),
        (3, (3, 2, 5), []),
        (4, (5, 3, 4), None),
        (0, (0, 3, 2), []),
    ):
        if expected is None:
            refused(student.copies_to, (target, *worlds), "rank 4 of 4")
        else:
            assert_copies(student, target, worlds, expected)
    for _ in range(60):
        worlds = random_worlds(chance)
        target = int(chance.integers(worlds[2]))
        own = [(s, i, j, n) for s, i, t, j, n in by_elements(*worlds) if t == target]
        assert_copies(student, target, worlds, own)


def test_the_whole_map_and_no_more_copies(student, chance):
    for _ in range(60):
        worlds = random_worlds(chance)
        got = [tuple(copy) for copy in student.reshard_map(*worlds)]
        expected = by_elements(*worlds)
        sums = sum(copy[-1] for copy in got), len(got)
        assert got == expected, (
            f"{told(*worlds)}: expected {len(expected)} copies, {expected!r:.300}; got {sums[1]} "
            f"of {sums[0]} elements together, {got!r:.300}"
        )
    for worlds in ((10, 0, 2), (10, 2, 0), (10, -1, 2), (10, 2, -3), (-1, 2, 2)):
        refused(student.reshard_map, worlds, told(*worlds))
        refused(student.copies_to, (0, *worlds), told(*worlds))
    for target in (-1, 2, 3):
        refused(student.copies_to, (target, 10, 3, 2), f"rank {target} of 2")
        refused(student.copies_to, (target, 0, 3, 2), f"rank {target} of 2, of no elements")


def test_no_padding_travels(student, chance):
    # 5 elements on 4 ranks are 2, 2, 1 and none, and on 3 ranks 2, 2 and 1
    assert_copies(student, 2, (5, 4, 3), [(2, 0, 0, 1)])
    assert_copies(student, 3, (5, 3, 4), [])
    for number in range(20):  # too large for floats, and for whoever goes through all ranks
        size = int(chance.integers(10**15, 10**18))
        fewest = 2 if number % 2 else 10**5
        sources, targets = chance.integers(fewest, 10 * fewest, 2).tolist()
        have, want = -(-size // sources), -(-size // targets)
        owners = -(-size // want)  # ranks behind these have padding only
        for target in {owners - 1, int(chance.integers(owners)), targets - 1}:
            worlds = size, sources, targets
            case = f"{told(*worlds)}, target rank {target}"
            copies = [tuple(copy) for copy in student.copies_to(target, *worlds)]
            length = max(0, min(size, (target + 1) * want) - target * want)
            assert sum(copy[-1] for copy in copies) == length, (
                f"{case}: expected {length} elements without padding, got {copies}"
            )
            for source, there, here, count in copies:
                assert source * have + there == target * want + here, (
                    f"{case}: {(source, there, here, count)} brings element "
                    f"{source * have + there} to the place of {target * want + here}"
                )
                assert 0 <= there <= have - count, f"{case}: {copies} leave a shard"
            sources_of = [copy[0] for copy in copies]
            assert sources_of == sorted(set(sources_of)), f"{case}: {copies} come not in one piece"


def test_shards_of_another_world(student, chance):
    for number in range(50):
        size, sources, targets = random_worlds(chance)
        dtype = DTYPES[number % len(DTYPES)]
        width, have = np.dtype(dtype).itemsize, math.ceil(size / sources)
        buffer = chance.bytes(size * width)
        padded = buffer + b"\x7f" * ((sources * have - size) * width)  # what is no one's
        shards = [
            np.frombuffer(padded[rank * have * width :][: have * width], dtype).copy()
            for rank in range(sources)
        ]
        kept = [shard.tobytes() for shard in shards]
        case = f"{told(size, sources, targets)}, {np.dtype(dtype)}"
        found, shared, locked = made_of(student.reshard, shards, size, targets)
        assert [shard.tobytes() for shard in shards] == kept, f"{case}: reshard changed the shards"
        want = math.ceil(size / targets)
        assert isinstance(found, list), f"{case}: a list is expected, not {type(found).__name__}"
        assert len(found) == targets, f"{case}: {len(found)} shards came back"
        whole = buffer.ljust(targets * want * width, b"\0")
        for rank, shard in enumerate(found):
            assert (shard.shape, shard.dtype) == ((want,), dtype), (
                f"{case}: the shard of rank {rank} is {shard.shape} {shard.dtype}, not {(want,)}"
            )
            expected = np.frombuffer(whole[rank * want * width :][: want * width], dtype)
            assert shard.tobytes() == expected.tobytes(), (
                f"{case}: the shard of rank {rank} is {shard.tolist()!r:.200}, expected "
                f"{expected.tolist()!r:.200}"
            )
        assert not shared, f"{case}: a new shard shares memory with an old or another new one"
        assert not locked, f"{case}: a new shard cannot be written to"
    three, two = np.ones(3, np.float32), np.ones(2, np.float32)
    for shards, size, targets, why in (
        ([three, two], 5, 2, "shards of 3 and 2 elements"),
        ([two, three], 5, 2, "shards of 2 and 3 elements"),
        ([three, two], 4, 2, "shards of 3 and 2 elements, for 4"),
        ([two, two], 5, 2, "shards of 2 elements, for 5"),
        ([three, three], 4, 2, "shards of 3 elements, for 4 on 2 ranks"),
        ([three, three.astype(np.float64)], 6, 2, "float32 and float64"),
        ([three, three.astype(np.float64), three], 9, 2, "float64 between two of float32"),
        ([three, two, three], 8, 2, "a shard of 2 elements between two of 3"),
        ([three.reshape(3, 1)] * 2, 6, 3, "shards of two dimensions"),
        ([], 0, 2, "no shards"),
        ([three], 3, 0, "no targets"),
    ):
        refused(student.reshard, (shards, size, targets), why)


def refused(function, arguments, why):
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{why}: expected a ValueError, got {got!r:.200}")
