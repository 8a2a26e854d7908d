"""Task 1: bytes side by side, cut into equal parts, are what the shards must be."""

import math

import numpy as np
from grader_memory import made_of, sharded_views

DTYPES = (np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16)


def random_shapes(chance):
    most = int(chance.choice([1, 3, 6]))
    return [
        tuple(chance.integers(int(chance.random() < 0.8), most + 1, chance.integers(1, 4)).tolist())
        for _ in range(chance.integers(1, 6))
    ]


def random_ranks(chance, shapes):
    elements = sum(map(math.prod, shapes))
    usual = [1, 2, 3, 4, 8, max(1, elements), elements + 1, elements + 5]
    return int(chance.choice(usual))


def random_tensors(chance, shapes, dtype):
    """Any bits: nan of many kinds, -0.0, infinities; and some that are all zero."""
    width = np.dtype(dtype).itemsize
    tensors = []
    for shape in shapes:
        length = math.prod(shape) * width
        bits = bytes(length) if chance.random() < 0.2 else chance.bytes(length)
        tensors.append(np.frombuffer(bits, dtype).reshape(shape).copy())
    return tensors


def by_bytes(tensors, ranks):
    """The shards as bytes: all tensors', then zeros, in equal parts."""
    whole = b"".join(tensor.tobytes() for tensor in tensors)
    length = math.ceil(sum(t.size for t in tensors) / ranks) * tensors[0].itemsize
    whole = whole.ljust(length * ranks, b"\0")
    return [whole[rank * length :][:length] for rank in range(ranks)]


def told(shapes, dtype, ranks):
    return f"tensors of {', '.join(map(str, shapes))} {np.dtype(dtype)} on {ranks} ranks"


def assert_shard(part, expected, dtype, case):
    assert isinstance(part, np.ndarray), f"{case}: got {type(part).__name__}, expected an array"
    length = len(expected) // np.dtype(dtype).itemsize
    assert part.shape == (length,), f"{case}: its shape is {part.shape}, expected {(length,)}"
    assert part.dtype == dtype, f"{case}: its dtype is {part.dtype}"
    assert part.tobytes() == expected, (
        f"{case}: expected {np.frombuffer(expected, dtype).tolist()!r:.200}, got "
        f"{part.tolist()!r:.200}"
    )


def test_shards_are_equal_parts_with_zeros_behind(student, chance):
    tensors = [np.arange(1, 7).reshape(2, 3), np.arange(7, 11)]
    for rank, expected in enumerate([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]):
        part = student.shard(tensors, rank, 3)
        case = f"1 to 6 in (2, 3), 7 to 10 in (4,), rank {rank} of 3"
        assert_shard(part, np.array(expected).tobytes(), tensors[0].dtype, case)
    for number in range(50):
        dtype, shapes = DTYPES[number % len(DTYPES)], random_shapes(chance)
        ranks, tensors = random_ranks(chance, shapes), random_tensors(chance, shapes, dtype)
        expected = by_bytes(tensors, ranks)
        kept = [tensor.tobytes() for tensor in tensors]
        for rank in {0, ranks - 1, *chance.integers(0, ranks, 4).tolist()}:
            case = f"{told(shapes, dtype, ranks)}, rank {rank}"
            assert_shard(student.shard(tensors, rank, ranks), expected[rank], dtype, case)
            assert [t.tobytes() for t in tensors] == kept, f"{case}: shard changed the tensors"


def test_the_round_trip_is_exact(student, chance):
    for number in range(50):
        dtype, shapes = DTYPES[number % len(DTYPES)], random_shapes(chance)
        ranks, tensors = random_ranks(chance, shapes), random_tensors(chance, shapes, dtype)
        shards = [np.frombuffer(part, dtype).copy() for part in by_bytes(tensors, ranks)]
        if number % 2 and shards[0].size:  # what stands behind the last element is nobody's
            size, elements = shards[0].size, sum(t.size for t in tensors)
            for position in range(elements, ranks * size):
                shards[position // size][position % size] = 77
        kept = [part.tobytes() for part in shards]
        case = told(shapes, dtype, ranks)
        assert_tensors(student.unshard(shards, shapes), tensors, case)
        assert [part.tobytes() for part in shards] == kept, f"{case}: unshard changed the shards"
        if ranks < 10:
            own = [student.shard(tensors, rank, ranks) for rank in range(ranks)]
            assert_tensors(student.unshard(own, shapes), tensors, f"{case}, there and back")


def assert_tensors(found, tensors, case):
    assert len(found) == len(tensors), f"{case}: {len(found)} tensors came back"
    for number, (one, expected) in enumerate(zip(found, tensors, strict=True)):
        assert isinstance(one, np.ndarray), f"{case}: tensor {number} is a {type(one).__name__}"
        assert (one.shape, one.dtype) == (expected.shape, expected.dtype), (
            f"{case}: tensor {number} came back as {one.shape} {one.dtype}"
        )
        assert one.tobytes() == expected.tobytes(), (
            f"{case}: tensor {number} came back with other bits: {one.tolist()!r:.200} of "
            f"{expected.tolist()!r:.200}"
        )


def test_what_a_rank_holds_of_each_tensor(student, chance):
    shapes = [(2, 3), (0, 5), (4,), (1, 1, 1)]
    for rank, expected in enumerate(
        [[(0, 0, 3)], [(0, 3, 6)], [(2, 0, 3)], [(2, 3, 4), (3, 0, 1)]]
    ):
        assert_pieces(student, shapes, rank, 4, expected)
    assert_pieces(student, [(2,), (1,)], 4, 8, [])
    assert_pieces(student, [(0,)], 0, 1, [])
    for _ in range(60):
        shapes = random_shapes(chance)
        ranks = random_ranks(chance, shapes)
        for rank in {0, ranks - 1, *chance.integers(0, ranks, 3).tolist()}:
            assert_pieces(student, shapes, rank, ranks, by_elements(shapes, rank, ranks))


def by_elements(shapes, rank, ranks):
    """Each element of the shard by the tensor that it is of, and those of one tensor together."""
    owners = [(n, i) for n, shape in enumerate(shapes) for i in range(math.prod(shape))]
    size = math.ceil(len(owners) / ranks)
    own: dict[int, list[int]] = {}
    for number, element in owners[rank * size :][:size]:
        own.setdefault(number, []).append(element)
    return [(number, elements[0], elements[-1] + 1) for number, elements in own.items()]


def assert_pieces(student, shapes, rank, ranks, expected):
    handed = list(shapes)
    got = [tuple(piece) for piece in student.pieces(handed, rank, ranks)]
    case = f"tensors of {', '.join(map(str, shapes))}, rank {rank} of {ranks}"
    assert handed == list(shapes), f"{case}: pieces changed the list of shapes"
    assert got == expected, f"{case}: expected the pieces {expected}, got {got}"
    assert all(type(n) is int for piece in got for n in piece), f"{case}: {got} are no ints"


def test_nothing_is_shared_and_nothing_silent(student, chance):
    for number in range(24):
        dtype, shapes = DTYPES[number % len(DTYPES)], random_shapes(chance)
        ranks = int(chance.choice([1, 1, 2, 3, 5]))
        shapes = shapes[:1] if number % 3 == 0 else shapes
        tensors, rank = random_tensors(chance, shapes, dtype), int(chance.integers(ranks))
        case = f"{told(shapes, dtype, ranks)}, rank {rank}"
        expected = by_bytes(tensors, ranks)
        found = sharded_views(student.shard, tensors, rank, ranks)
        for (part, shared), order in zip(found, ("column-major", "strided", "plain"), strict=True):
            assert_shard(part, expected[rank], dtype, f"{case}, in {order} memory")
            assert not shared, f"{case}, in {order} memory: the shard is a view of the tensors"
        shards = [np.frombuffer(part, dtype).copy() for part in expected]
        back, shared, locked = made_of(student.unshard, shards, shapes)
        assert_tensors(back, tensors, case)
        assert not shared, f"{case}: an unsharded tensor shares memory with a shard or another"
        assert not locked, f"{case}: an unsharded tensor cannot be written to"
    floats, more = np.ones((2, 3), np.float32), np.ones(4, np.float32)
    for arguments, why in (
        (([floats, more], 2, 2), "rank 2 of 2"),
        (([floats, more], -1, 2), "rank -1"),
        (([floats], 0, 0), "no ranks"),
        (([], 0, 2), "no tensor"),
        (([floats, more.astype(np.float64)], 0, 2), "float32 and float64 in one buffer"),
        (([floats, more.astype(np.float64), floats], 0, 2), "float64 between two of float32"),
        (([floats, np.ones((), np.float32)], 0, 2), "a scalar among the tensors"),
        (([floats, np.ones((), np.float32), more], 0, 2), "a scalar in the middle"),
        (([np.ones((), np.float32), floats], 0, 2), "a scalar first"),
    ):
        refused(student.shard, arguments, why)
    shapes = [(2, 3), (4,)]
    good, short, long = (np.ones(size, np.float32) for size in (5, 4, 6))
    for shards, why in (
        ([good, short], "shards of 5 and 4 elements"),
        ([long, short], "shards of 6 and 4 elements"),
        ([long, good, good], "shards of 6, 5 and 5 elements"),
        ([short, short, good], "shards of 4, 4 and 5 elements"),
        ([good, short, short], "shards of 5, 4 and 4 elements"),
        ([short, short, short, long], "three shards of 4 elements and one of 6"),
        ([good.reshape(1, 5)] * 2, "shards of two dimensions"),
        ([short, short], "shards of 4 elements, for 10"),
        ([long, long], "shards of 6 elements, for 10 on 2 ranks"),
        ([good, good.astype(np.float16)], "shards of float32 and float16"),
        ([short, short.astype(np.float16), short], "float16 between two shards of float32"),
        ([good], "one shard of two"),
        ([], "no shard"),
    ):
        refused(student.unshard, (shards, shapes), why)
    for rank, ranks in ((3, 3), (-1, 3), (0, 0)):
        refused(student.pieces, (shapes, rank, ranks), f"rank {rank} of {ranks}")


def refused(function, arguments, why):
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{why}: expected a ValueError, got {got!r:.200}")
