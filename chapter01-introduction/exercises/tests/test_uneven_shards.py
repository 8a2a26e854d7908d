"""Task 1: the combined gradient is the one-machine gradient of a linear regression."""

import math

import numpy as np

EXAMPLES, FEATURES = 24, 5
TOLERANCE = 1e-12  # float64: a few hundred roundings of 1e-16 on values near 1
SHAPES = [(), (1,), (7,), (2, 3), (3, 1, 2)]
DTYPES = [np.float64, np.float32, np.float16]
RANDOM_CASES = 25


def test_equal_shards(student, chance):
    check_one_machine(student, [6, 6, 6, 6])
    for _ in range(RANDOM_CASES):
        check_drawn(student, chance, [int(chance.integers(1, 100))] * int(chance.integers(1, 8)))


def test_uneven_shards(student, chance):
    check_one_machine(student, [13, 7, 3, 1])
    for _ in range(RANDOM_CASES):
        check_drawn(student, chance, chance.integers(1, 100, chance.integers(1, 8)).tolist())
    check_drawn(student, chance, [10**9, 1])
    check_drawn(student, chance, chance.integers(1, 100, 64).tolist())
    check_result_is_the_callers(student, chance)


def test_empty_shard(student, chance):
    check_one_machine(student, [0, 20, 4])
    for _ in range(RANDOM_CASES):
        counts = chance.integers(1, 100, chance.integers(2, 8))
        counts[chance.permutation(len(counts))[1:]] *= chance.integers(0, 2, len(counts) - 1)
        check_drawn(student, chance, counts.tolist())
    counts, broken = [3, 0, 5], np.array([np.nan, np.inf, -np.inf, 1.0])
    got = np.asarray(student.combine_gradients([np.ones(4), np.full(4, np.nan), broken], counts))
    assert np.isfinite(got).tolist() == [False, False, False, True], (
        f"counts {counts}: the last worker has examples and the gradient {broken.tolist()}; its "
        f"NaN and infinities must be seen in the result, and only there, got {got.tolist()}"
    )


def test_scaled_gradients_average_to_the_global_one(student, chance):
    for counts in ([6, 6, 6, 6], [13, 7, 3, 1], [20, 4]):
        workers = len(counts)
        scales = [student.gradient_scale(count, EXAMPLES, workers) for count in counts]
        pairs = zip(scales, local_gradients(counts), strict=True)
        averaged = sum(scale * gradient for scale, gradient in pairs) / workers
        difference = np.abs(averaged - gradient_of(slice(None))).max()
        assert difference < TOLERANCE, (
            f"{workers} workers with {counts} examples: scaled by {rounded(scales)} and averaged "
            f"by DDP, the gradients differ from the one-machine gradient by {difference:.1e}"
        )
    for _ in range(RANDOM_CASES):
        counts = [1, *chance.choice([0, 1, 24, 999], chance.integers(0, 8)).tolist()]
        # a worker whose gradient is one everywhere, the others' being zero, shows its own weight
        for count in counts:
            scale = student.gradient_scale(count, sum(counts), len(counts))
            averaged, weight = scale / len(counts), count / sum(counts)
            assert abs(averaged - weight) < TOLERANCE, (
                f"{len(counts)} workers with {counts} examples: the worker with {count} scales by "
                f"{scale}; after DDP's average it weighs {averaged:.6g}, expected {weight:.6g}"
            )


def check_one_machine(student, counts):
    """The shards of one linear regression give the gradient of the whole of it."""
    check(student, local_gradients(counts), counts, gradient_of(slice(None)))


def check_drawn(student, chance, counts):
    """Any gradients of any shape and dtype, against sums that are rounded once."""
    shape = SHAPES[chance.integers(len(SHAPES))]
    dtype = DTYPES[chance.integers(len(DTYPES))]
    nothing = [np.nan, np.inf, 5.0][chance.integers(3)]
    gradients = [
        np.asarray(chance.normal(size=shape), dtype) if count else np.full(shape, nothing, dtype)
        for count in counts
    ]
    used = [(gradient, count) for gradient, count in zip(gradients, counts, strict=True) if count]
    expected = np.empty(shape)
    for place in np.ndindex(shape):
        weighted = math.fsum(count * float(gradient[place]) for gradient, count in used)
        expected[place] = weighted / sum(counts)
    check(student, gradients, counts, expected)


def check(student, gradients, counts, expected):
    kept, kept_counts = [gradient.copy() for gradient in gradients], list(counts)
    combined = np.asarray(student.combine_gradients(gradients, counts))
    case = f"shards of {kept_counts} examples, {kept[0].dtype} of shape {kept[0].shape}"
    assert combined.shape == expected.shape, (
        f"{case}: expected a gradient of that shape, got {combined.shape}"
    )
    assert combined.dtype == np.float64, f"{case}: expected float64, got {combined.dtype}"
    difference = np.abs(combined - expected).max()
    assert difference < TOLERANCE, (
        f"{case}: expected the one-machine gradient {rounded(expected)}, got {rounded(combined)}, "
        f"which differs by {difference:.1e}; the workers' gradients: "
        f"{[rounded(gradient) for gradient in kept]}"
    )
    unchanged = len(gradients) == len(kept) and all(map(same, gradients, kept))
    assert unchanged and counts == kept_counts, (
        f"{case}: combine_gradients changes the gradients or counts that it is given; work on a "
        "copy"
    )


def check_result_is_the_callers(student, chance):
    """A caller may change the result: it is no worker's gradient, and no later result."""
    for counts in ([6], [6, 0], [6, 3]):
        gradients = [chance.normal(size=5) for _ in counts]
        kept = [gradient.copy() for gradient in gradients]
        first = student.combine_gradients(gradients, counts)
        first *= 2
        case = f"shards of {counts} examples: the caller doubles the result"
        assert all(map(same, gradients, kept)), f"{case}, and a worker's gradient has changed"
        changed = first.copy()
        student.combine_gradients([-gradient for gradient in gradients], counts)
        assert same(first, changed), f"{case}, and another call has changed it"


def same(array, kept):
    return np.array_equal(array, kept, equal_nan=True)


def local_gradients(counts):
    """Each worker's mean gradient over its own, consecutive examples; NaN without examples."""
    ends = np.cumsum(counts)
    return [
        gradient_of(slice(end - count, end)) if count else np.full(FEATURES, np.nan)
        for count, end in zip(counts, ends, strict=True)
    ]


def gradient_of(examples):
    """The gradient at w = 1 of the mean of (x w - y)^2 / 2 over the chosen examples: [FEATURES]."""
    random = np.random.default_rng(1)
    x = random.normal(size=(EXAMPLES, FEATURES))
    y = random.normal(size=EXAMPLES) * np.linspace(0.1, 4.0, EXAMPLES)
    x, y = x[examples], y[examples]
    return x.T @ (x.sum(axis=1) - y) / len(y)


def rounded(values):
    return [round(float(value), 3) for value in np.ravel(values)]
