"""Task 1: the combined gradient is the one-machine gradient of a linear regression."""

import numpy as np

EXAMPLES, FEATURES = 24, 5
TOLERANCE = 1e-12  # float64: a few hundred roundings of 1e-16 on values near 1


def test_equal_shards(student):
    check_combined(student, [6, 6, 6, 6])


def test_uneven_shards(student):
    check_combined(student, [13, 7, 3, 1])
    gradients = local_gradients([13, 11])
    before = [gradient.copy() for gradient in gradients]
    student.combine_gradients(gradients, [13, 11])
    assert all(np.array_equal(a, b) for a, b in zip(gradients, before, strict=True)), (
        "combine_gradients changes the gradients that it is given; work on a copy"
    )


def test_empty_shard(student):
    check_combined(student, [0, 20, 4])


def test_scaled_gradients_average_to_the_global_one(student):
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


def check_combined(student, counts):
    combined = np.asarray(student.combine_gradients(local_gradients(counts), counts))
    expected = gradient_of(slice(None))
    assert combined.shape == expected.shape, (
        f"the gradients have shape {expected.shape}, the combined one {combined.shape}"
    )
    assert combined.dtype == np.float64, f"float64 gradients were combined to {combined.dtype}"
    difference = np.abs(combined - expected).max()
    assert difference < TOLERANCE, (
        f"shards of {counts} examples: expected the one-machine gradient {rounded(expected)}, "
        f"got {rounded(combined)}, which differs by {difference:.1e}"
    )


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
    return [round(float(value), 3) for value in values]
