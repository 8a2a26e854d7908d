"""Task 3: one message at a time, then a thousand of them."""

import numpy as np

SIZE = 257


def gradients(count, seed=5, size=SIZE):
    """Of very different magnitudes, as the layers' are."""
    chance = np.random.default_rng(seed)
    magnitudes = 10.0 ** chance.uniform(-4, 0, size)
    return [(chance.normal(size=size) * magnitudes).astype(np.float32) for _ in range(count)]


def received(message, case):
    """What the receiver makes of a message, after a look at its form."""
    quantised, scale = message
    assert isinstance(quantised, np.ndarray) and quantised.dtype == np.int8, (
        f"{case}: quantised is {getattr(quantised, 'dtype', type(quantised).__name__)}, not int8"
    )
    assert np.isfinite(scale), f"{case}: the scale is {scale}"
    return quantised.astype(np.float64) * scale


def test_each_message_is_within_half_a_step(student):
    for number, gradient in enumerate(gradients(20)):
        quantised, scale = student.make_compressor(SIZE).compress(gradient.copy())
        case = f"gradient {number} of a new compressor"
        sent = received((quantised, scale), case)
        expected = np.abs(gradient).max() / 127
        assert abs(scale - expected) < 1e-5 * expected, (
            f"{case}: the scale is {scale:.6g}, and the largest magnitude / 127 is {expected:.6g}"
        )
        assert quantised.min() >= -127, f"{case}: {quantised.min()} is outside -127 to 127"
        worst = np.abs(sent - gradient).max() / scale
        assert worst < 0.501, (
            f"{case}: a value is {worst:.3g} steps away from what was sent; rounding to the "
            "nearest leaves at most half a step"
        )


def test_what_was_sent_sums_to_what_was_given(student):
    compressor = student.make_compressor(SIZE)
    given, sent = np.zeros(SIZE), np.zeros(SIZE)
    largest = 0.0
    for step, gradient in enumerate(gradients(300)):
        given += gradient
        sent += received(compressor.compress(gradient.copy()), f"step {step}")
        largest = max(largest, float(np.abs(gradient).max()))
        missing = np.abs(given - sent).max()
        assert missing < largest / 120, (
            f"after {step + 1} gradients the sum of what was sent is {missing:.3g} away from the "
            f"sum of what was given; what cannot be sent now must be sent later, so it never is "
            f"more than half a step, here about {largest / 254:.2g}"
        )
    residual = np.asarray(compressor.residual, dtype=np.float64)
    assert np.abs(given - sent - residual).max() < 1e-4 * largest, (
        "after 300 gradients the residual is not what was given and not yet sent: they differ by "
        f"{np.abs(given - sent - residual).max():.3g}"
    )


def test_small_gradients_get_through_in_time(student):
    # next to 1.0 a step is 1/127: a gradient of 0.001 alone would be rounded to nothing, always
    compressor = student.make_compressor(3)
    sent = np.zeros(3)
    for step in range(1000):
        gradient = np.array([1.0, 0.001, -0.0005], dtype=np.float32)
        sent += received(compressor.compress(gradient), f"step {step}")
    for place, expected in enumerate((1000.0, 1.0, -0.5)):
        assert abs(sent[place] - expected) < 0.01, (
            f"1,000 gradients of {expected / 1000:g} beside others of 1: {sent[place]:.4g} was "
            f"sent in all, expected {expected:g} to within a step"
        )


def test_zeros_and_the_callers_arrays(student):
    compressor = student.make_compressor(4)
    with np.errstate(all="ignore"):
        quantised, scale = compressor.compress(np.zeros(4, dtype=np.float32))
    sent = received((quantised, scale), "a gradient of zeros")
    assert scale == 0 and not sent.any(), f"a gradient of zeros: sent {sent.tolist()}, {scale=}"
    gradient = np.array([1.0, 0.3, -0.2, 0.0], dtype=np.float32)
    kept = gradient.copy()
    first, _ = compressor.compress(gradient)
    copied = first.copy()
    assert np.array_equal(gradient, kept), "compress changed the gradient that it was given"
    compressor.compress(np.array([-1.0, 0.5, 0.5, 0.5], dtype=np.float32))
    assert np.array_equal(first, copied), "a later compress changed the message before it"
    other = student.make_compressor(4)
    assert not np.asarray(other.residual).any(), "a new compressor begins with another's residual"
