"""Task 2: timelines by hand, then bucket sizes against every candidate tried."""

import random

TOLERANCE = 1e-9
MIB = 2**20


def assert_end(student, ready, sizes, alpha, beta, expected, why):
    got = student.step_end(list(ready), list(sizes), alpha, beta)
    assert abs(got - expected) < TOLERANCE, (
        f"buckets full at {list(ready)} s with {list(sizes)} bytes, alpha {alpha} s, beta {beta} "
        f"s/B: the step ends at {got} s, expected {expected}: {why}"
    )


def test_steps_by_hand(student):
    assert_end(student, [], [], 0.5, 0.1, 0.0, "there is no bucket")
    assert_end(student, [2.0], [10], 0.5, 0.1, 3.5, "one bucket starts when it is full")
    assert_end(
        student, [1.0, 2.0], [5, 5], 0.0, 0.1, 2.5, "the first is reduced beside the backward pass"
    )
    assert_end(student, [0.0, 0.0], [5, 5], 0.25, 0.1, 1.5, "each all-reduce has its own alpha")


def test_buckets_go_one_after_another_in_their_order(student):
    assert_end(
        student, [1.0, 1.5, 2.0], [10, 10, 10], 0.0, 0.1, 4.0, "the link carries one at once"
    )
    assert_end(student, [1.0, 5.0], [10, 10], 0.0, 0.1, 6.0, "the link waits for the second bucket")
    assert_end(
        student, [4.0, 1.0], [10, 30], 0.0, 0.1, 8.0,
        "bucket 1 is full first, but every rank sends bucket 0 before it",
    )  # fmt: skip
    assert_end(
        student, [1.0, 1.0, 9.0], [10, 40, 10], 0.0, 0.1, 10.0, "a queue that is gone delays nobody"
    )


def test_a_bucket_waits_for_its_last_gradient(student):
    gradients = [(1.0, 4), (2.0, 4), (3.0, 4), (4.0, 20), (5.0, 4)]
    assert_buckets(student, gradients, 8, [2.0, 3.0, 4.0, 5.0], [8, 4, 20, 4])
    assert_buckets(student, gradients, 12, [3.0, 4.0, 5.0], [12, 20, 4])
    assert_buckets(student, gradients, 1, [1.0, 2.0, 3.0, 4.0, 5.0], [4, 4, 4, 20, 4])
    assert_buckets(student, gradients, 1000, [5.0], [36])
    assert_buckets(student, [], 8, [], [])


def assert_buckets(student, gradients, cap, ready, sizes):
    got = tuple(list(part) for part in student.fill_buckets(list(gradients), cap))
    assert got[1] == sizes, (
        f"gradients (ready, bytes) {gradients} in buckets of at most {cap} bytes: the sizes are "
        f"{got[1]}, expected {sizes}"
    )
    assert got[0] == ready, (
        f"gradients (ready, bytes) {gradients} in buckets of at most {cap} bytes: they are full at "
        f"{got[0]}, expected {ready}: when their last gradient is ready"
    )


def test_the_best_bucket_size(student):
    for seed in range(40):
        chance = random.Random(seed)
        now, gradients = 0.0, []
        for _ in range(chance.randint(1, 40)):
            now += chance.uniform(0.001, 0.01)
            gradients.append((now, chance.randint(1, 4 * MIB)))
        alpha, beta = chance.choice([0.0, 1e-4, 1e-2]), chance.choice([1e-10, 8e-9])
        candidates = chance.sample([MIB // 4, MIB, 4 * MIB, 25 * MIB, 1000 * MIB], 4)
        ends = {one: end_of(gradients, one, alpha, beta) for one in candidates}
        best = max(one for one in candidates if ends[one] - min(ends.values()) < 1e-12)
        got = student.best_bucket_bytes(list(gradients), list(candidates), alpha, beta)
        assert got in ends, f"{got} is none of the candidates {candidates}"
        assert got == best, (
            f"{len(gradients)} gradients, alpha {alpha} s, beta {beta} s/B: buckets of {got:,} "
            f"bytes end the step at {ends[got]:.6f} s, those of {best:,} bytes at {ends[best]:.6f} "
            "s, and of equally good ones the largest is wanted"
        )


def end_of(gradients, cap, alpha, beta):
    """The step's end with buckets of at most `cap` bytes, gradient by gradient."""
    free, held, full = 0.0, 0.0, 0.0
    for when, size in [*gradients, (None, float("inf"))]:
        if held and held + size > cap:
            free, held = max(free, full) + alpha + beta * held, 0.0
        if when is not None:
            held, full = held + size, when
    return free
