"""Task 2: the workers together compute what one worker computes."""

import threading

import numpy as np
from grader_network import run_workers

HIDDEN, INNER, TOKENS = 6, 12, 5
WORLD_SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-12  # float64; only the order of the sums differs. Whole numbers must agree exactly
RANDOM_CASES = 8


class Meeting:
    """An all-reduce between threads, which notes what each worker brings."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size, timeout=10)
        self.parts, self.calls = {}, [[] for _ in range(world_size)]  # (shape, dtype) of each call

    def all_reduce_of(self, rank):
        def all_reduce(array):
            self.parts[rank] = np.array(array)
            self.calls[rank].append((self.parts[rank].shape, str(self.parts[rank].dtype)))
            self.barrier.wait()
            total = sum(self.parts.values())
            self.barrier.wait()
            return total

        return all_reduce


def test_shards_make_up_the_weight(student, chance):
    up, down = visible_problem()[1:3]
    for world_size in WORLD_SIZES:
        check_shards(student, up, down, world_size)
    for _ in range(RANDOM_CASES):
        world_size = int(chance.integers(1, 8))
        _, up, down, _ = drawn_problem(chance, world_size)
        check_shards(student, up, down, world_size)
        check_shards(student, up, down, up.shape[1])  # one column each
    up, down = np.ones((6, 12)), np.ones((12, 6))
    for world_size in (5, 7, 24):
        check_refused(student, up, down, world_size)
    check_refused(student, np.ones((6, 13)), np.ones((13, 6)), int(chance.integers(2, 13)))


def test_forward_equals_one_worker(student, chance):
    for case in cases(chance):
        for rank, steps in enumerate(together(student, *case)):
            for step, (problem, results) in enumerate(zip(case[1], steps, strict=True)):
                expected = alone(*problem)
                assert_close("y", rank, case, step, results["y"], expected["y"])


def test_gradients_equal_one_worker(student, chance):
    for case in cases(chance):
        world_size, problems = case
        for rank, steps in enumerate(together(student, *case)):
            for step, (problem, results) in enumerate(zip(problems, steps, strict=True)):
                expected = alone(*problem)
                up = np.split(expected["dL/dup"], world_size, axis=1)[rank]
                down = np.split(expected["dL/ddown"], world_size, axis=0)[rank]
                assert_close("dL/dx", rank, case, step, results["dL/dx"], expected["dL/dx"])
                assert_close("dL/dup", rank, case, step, results["dL/dup"], up)
                assert_close("dL/ddown", rank, case, step, results["dL/ddown"], down)


def test_one_all_reduce_each_way(student, chance):
    for case in cases(chance):
        world_size, problems = case
        for rank, steps in enumerate(together(student, *case)):
            for (x, *_), results in zip(problems, steps, strict=True):
                forward, backward = results["calls"]
                assert (len(forward), len(backward)) == (1, 1), (
                    f"worker {rank} of {world_size} called all_reduce {len(forward)} times forward "
                    f"and {len(backward)} times backward; once each is enough"
                )
                wanted = x.shape, str(x.dtype)
                assert forward + backward == [wanted, wanted], (
                    f"worker {rank} of {world_size}: all_reduce gets {forward[0]} forward and "
                    f"{backward[0]} backward; expected {wanted}, as large as x, each way"
                )


def check_shards(student, up, down, world_size):
    inner = up.shape[1] // world_size
    kept = up.copy(), down.copy()
    shards = [student.split_weights(up, down, rank, world_size) for rank in range(world_size)]
    for rank, (up_shard, down_shard) in enumerate(shards):
        place = f"worker {rank} of {world_size}"
        expected = ((up.shape[0], inner), (inner, up.shape[0]))
        got = (np.shape(up_shard), np.shape(down_shard))
        assert got == expected, f"{place}: shards of shapes {got}, expected {expected}"
        columns = slice(rank * inner, (rank + 1) * inner)
        assert np.array_equal(up_shard, kept[0][:, columns]), (
            f"{place}: expected the columns {columns.start} to {columns.stop - 1} of up, in order"
        )
        assert np.array_equal(down_shard, kept[1][columns]), (
            f"{place}: expected the rows {columns.start} to {columns.stop - 1} of down, in order"
        )
        assert up_shard.dtype == down_shard.dtype == up.dtype, f"{place}: the dtype has changed"
    assert np.array_equal(up, kept[0]) and np.array_equal(down, kept[1]), (
        "split_weights changes the matrices that it is given"
    )


def check_refused(student, up, down, world_size):
    case = f"{world_size} workers do not divide {up.shape[1]} columns"
    try:
        student.split_weights(up, down, 0, world_size)
    except ValueError as error:
        assert str(world_size) in str(error) and str(up.shape[1]) in str(error), (
            f"{case}: the ValueError does not name both numbers: {error}"
        )
    else:
        raise AssertionError(f"{case}: expected a ValueError")


def cases(chance):
    """(world_size, the problems of one layer in a row): one visible, others drawn."""
    yield from ((world_size, [visible_problem()]) for world_size in WORLD_SIZES)
    for _ in range(RANDOM_CASES):
        world_size = int(chance.integers(1, 6))
        first = drawn_problem(chance, world_size)
        x, grad_y = (whole(chance, first[0].shape, first[0].dtype) for _ in range(2))
        yield world_size, [first, (x, *first[1:3], grad_y), first]


def visible_problem():
    generator = np.random.default_rng(7)
    x = generator.normal(size=(TOKENS, HIDDEN))
    up, down = generator.normal(size=(HIDDEN, INNER)), generator.normal(size=(INNER, HIDDEN))
    return x, up, down, generator.normal(size=(TOKENS, HIDDEN))


def drawn_problem(chance, world_size):
    """Whole numbers, so that sums are exact in any order, and relu often gets exactly 0."""
    dtype = chance.choice([np.float64, np.float32])
    tokens, hidden = (int(size) for size in chance.integers(1, 6, 2))
    inner = world_size * int(chance.integers(1, 6))
    shapes = ((tokens, hidden), (hidden, inner), (inner, hidden), (tokens, hidden))
    return tuple(whole(chance, shape, dtype) for shape in shapes)


def whole(chance, shape, dtype):
    return chance.integers(-2, 3, shape).astype(dtype)


def alone(x, up, down, grad_y):
    """Column by column of the layer between: what each adds to y and to the gradients."""
    y, grad_x = np.zeros_like(x), np.zeros_like(x)
    grad_up, grad_down = np.zeros_like(up), np.zeros_like(down)
    for column in range(up.shape[1]):
        before = x @ up[:, column]
        active = np.where(before > 0, before, 0)
        slope = np.where(before > 0, grad_y @ down[column], 0)
        y += np.outer(active, down[column])
        grad_x += np.outer(slope, up[:, column])
        grad_up[:, column], grad_down[column] = slope @ x, active @ grad_y
    return {"y": y, "dL/dx": grad_x, "dL/dup": grad_up, "dL/ddown": grad_down}


def together(student, world_size, problems):
    """Per worker and problem: y, the gradients and the all-reduces (forward, backward).

    Between a layer's forward and its backward pass another layer of the worker has its own, and
    the layer itself has seen another input before.
    """
    meeting, other_meeting = Meeting(world_size), Meeting(world_size)

    def work(rank):
        _, up, down, _ = problems[0]
        shards = [
            np.split(up, world_size, axis=1)[rank].copy(),
            np.split(down, world_size, axis=0)[rank].copy(),
        ]
        mlp = student.make_parallel_mlp(*shards, meeting.all_reduce_of(rank))
        other = student.make_parallel_mlp(*shards, other_meeting.all_reduce_of(rank))
        results = []
        for x, _, _, grad_y in problems:
            given = [*shards, x.copy(), grad_y.copy()]
            kept = [array.copy() for array in given]
            mlp.forward(given[2][::-1].copy())
            started = len(meeting.calls[rank])
            y = mlp.forward(given[2])
            forward = len(meeting.calls[rank])
            other.forward(-given[2])
            grad_x, grad_up, grad_down = mlp.backward(given[3])
            unchanged = all(np.array_equal(a, b) for a, b in zip(given, kept, strict=True))
            assert unchanged, "forward or backward changes x, grad_y or the shards that it is given"
            calls = meeting.calls[rank][started:forward], meeting.calls[rank][forward:]
            results.append(
                {"y": y, "dL/dx": grad_x, "dL/dup": grad_up, "dL/ddown": grad_down, "calls": calls}
            )
        return results

    return run_workers(world_size, work)


def assert_close(name, rank, case, step, got, expected):
    world_size, problems = case
    x, up, down, grad_y = problems[step]
    place = f"{name} on worker {rank} of {world_size}"
    assert np.shape(got) == expected.shape, (
        f"{place} has the shape {np.shape(got)}, expected {expected.shape}"
    )
    assert got.dtype == expected.dtype, f"{place} is {got.dtype}, expected {expected.dtype}"
    worst = np.abs(got - expected).max()
    exact = (x == x.round()).all()
    tolerance = 0 if exact else TOLERANCE * max(1, np.abs(expected).max())
    shown = (
        f": step {step} with x {x.tolist()}, up {up.tolist()}, down {down.tolist()}, dL/dy "
        f"{grad_y.tolist()}: expected {expected.tolist()}, got {np.asarray(got).tolist()}"
    )
    assert worst <= tolerance, (
        f"{place} differs from one worker's by {worst:.2g}{shown if exact else ''}"
    )
