"""Task 2: timelines by hand, random ones by a formula without a clock, and every size tried."""

import itertools

TOLERANCE = 1e-9
TIED_S = 1e-12
MIB = 2**20


def assert_end(student, ready, sizes, alpha, beta, expected, why):
    handed = list(ready), list(sizes)
    got = student.step_end(*handed, alpha, beta)
    assert handed == (list(ready), list(sizes)), "step_end changed the lists that it was given"
    assert abs(got - expected) < TOLERANCE * max(1.0, expected), (
        f"buckets full at {list(ready)} s with {list(sizes)} bytes, alpha {alpha} s, beta {beta} "
        f"s/B: the step ends at {got} s, expected {expected}: {why}"
    )


def test_steps_by_hand(student, chance):
    assert_end(student, [], [], 0.5, 0.1, 0.0, "there is no bucket")
    assert_end(student, [2.0], [10], 0.5, 0.1, 3.5, "one bucket starts when it is full")
    assert_end(
        student, [1.0, 2.0], [5, 5], 0.0, 0.1, 2.5, "the first is reduced beside the backward pass"
    )
    assert_end(student, [0.0, 0.0], [5, 5], 0.25, 0.1, 1.5, "each all-reduce has its own alpha")
    for _ in range(20):
        assert_random_end(student, chance, int(chance.integers(1, 3)), in_order=True)


def test_buckets_go_one_after_another_in_their_order(student, chance):
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
    for in_order in [True, False] * 20:
        assert_random_end(student, chance, int(chance.integers(3, 30)), in_order)


def assert_random_end(student, chance, buckets, in_order):
    ready = chance.uniform(0, 1, buckets).round(3).tolist()
    sizes = chance.integers(1, 10**6, buckets).tolist()
    alpha = float(chance.choice([0.0, 1e-3, 0.05]))
    beta = float(chance.choice([0.0, 1e-9, 1e-6 / buckets, 1e-6]))
    ready = sorted(ready) if in_order else ready
    expected = end_by_delays(ready, sizes, alpha, beta)
    assert_end(student, ready, sizes, alpha, beta, expected,
               "no bucket, with all that are sent after it, fits in later")  # fmt: skip


def end_by_delays(ready, sizes, alpha, beta):
    """From each bucket on the link may be busy to the end: the latest of these ends."""
    costs = [alpha + beta * size for size in sizes]
    return max((when + sum(costs[i:]) for i, when in enumerate(ready)), default=0.0)


def test_a_bucket_waits_for_its_last_gradient(student, chance):
    gradients = [(1.0, 4), (2.0, 4), (3.0, 4), (4.0, 20), (5.0, 4)]
    assert_buckets(student, gradients, 8, [2.0, 3.0, 4.0, 5.0], [8, 4, 20, 4])
    assert_buckets(student, gradients, 12, [3.0, 4.0, 5.0], [12, 20, 4])
    assert_buckets(student, gradients, 1, [1.0, 2.0, 3.0, 4.0, 5.0], [4, 4, 4, 20, 4])
    assert_buckets(student, gradients, 1000, [5.0], [36])
    assert_buckets(student, [], 8, [], [])
    for _ in range(60):
        gradients = random_gradients(chance, int(chance.integers(1, 30)), largest=9)
        cap = int(chance.integers(1, 30))
        assert_buckets(student, gradients, cap, *whole_buckets(gradients, cap))


def random_gradients(chance, count, largest):
    """Ready one after another, some at the same time."""
    steps = chance.choice([0.0, 0.001, 0.004, 0.01], count) * chance.uniform(0.5, 2)
    sizes = chance.integers(1, largest + 1, count).tolist()
    return list(zip(steps.cumsum().tolist(), sizes, strict=True))


def whole_buckets(gradients, cap):
    """(ready, sizes): each bucket is the longest run that fits, or one gradient."""
    ready, sizes = [], []
    while gradients:
        sums = list(itertools.accumulate(size for _, size in gradients))
        count = max(1, sum(total <= cap for total in sums))
        ready.append(gradients[count - 1][0])
        sizes.append(sums[count - 1])
        gradients = gradients[count:]
    return ready, sizes


def assert_buckets(student, gradients, cap, ready, sizes):
    handed = list(gradients)
    got = tuple(list(part) for part in student.fill_buckets(handed, cap))
    assert handed == list(gradients), "fill_buckets changed the list that it was given"
    assert got[1] == sizes, (
        f"gradients (ready, bytes) {gradients} in buckets of at most {cap} bytes: the sizes are "
        f"{got[1]}, expected {sizes}"
    )
    assert got[0] == ready, (
        f"gradients (ready, bytes) {gradients} in buckets of at most {cap} bytes: they are full at "
        f"{got[0]}, expected {ready}: when their last gradient is ready"
    )


def test_the_best_bucket_size(student, chance):
    assert_best(student, [], chance.permutation([3, 1, 2]).tolist(), 0.1, 0.1)
    for apart in (0.0, 2e-13, 5e-12):
        # two buckets end the step this much earlier than one
        gradients = [(0.0, 1000), (apart, 700)]
        assert_best(student, gradients, chance.permutation([1000, 1700, 50]).tolist(), 0.0, 1e-10)
    for begin in (0.0, 1.0):  # a tie is of 1e-12 s, however late it is
        for first, second in ((0.7e-12, 1.4e-12), (0.3e-12, 0.6e-12), (5e-12, 5.7e-12)):
            # three, two and one bucket, and each ends the step a little later
            gradients = [(begin, 1000), (begin + first, 700), (begin + second, 300)]
            assert_best(student, gradients, chance.permutation([1000, 1700, 2000]).tolist(),
                        0.0, 1e-10)  # fmt: skip
    for _ in range(60):
        count = int(chance.integers(1, 40))
        gradients = random_gradients(chance, count, largest=int(chance.choice([5, 4 * MIB])))
        whole = sum(size for _, size in gradients)
        # above the whole they are all the same; at a sum of sizes a bucket is exactly full
        sizes = {max(1, int(whole * part)) for part in chance.uniform(0, 1.5, 4)}
        sizes |= {sum(size for _, size in gradients[: int(chance.integers(1, count + 1))])}
        alpha = float(chance.choice([0.0, 1e-4, 1e-2]))
        beta = float(chance.choice([1e-3, 0.05, 0.3])) / whole
        assert_best(student, gradients, chance.permutation(list(sizes)).tolist(), alpha, beta)


def assert_best(student, gradients, candidates, alpha, beta):
    ends = {one: end_by_delays(*whole_buckets(gradients, one), alpha, beta) for one in candidates}
    best = max(one for one in candidates if ends[one] - min(ends.values()) < TIED_S)
    handed = list(gradients), list(candidates)
    got = student.best_bucket_bytes(*handed, alpha, beta)
    assert handed == (list(gradients), list(candidates)), (
        "best_bucket_bytes changed the lists that it was given"
    )
    assert got in ends, f"{got} is none of the candidates {candidates}"
    assert got == best, (
        f"{len(gradients)} gradients, candidates {candidates}, alpha {alpha} s, beta {beta:.3g} "
        f"s/B: buckets of {got:,} bytes end the step at {ends[got]:.14f} s, those of {best:,} "
        f"bytes at {ends[best]:.14f} s, and of equally good ones the largest is wanted"
    )
