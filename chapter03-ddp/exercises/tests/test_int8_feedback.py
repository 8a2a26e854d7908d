"""Task 3: message after message, each against what was given and what was left over till then."""

import numpy as np

STEP_ROUNDING = 1e-3  # of a step: what float32 loses of values that are at most 127 steps


def gradients(chance, count, size):
    """Of very different magnitudes, as the layers' are, and the whole now large, now small."""
    magnitudes = 10.0 ** chance.uniform(-4, 0, size) * 10.0 ** chance.integers(-20, 9)
    for _ in range(count):
        whole = chance.choice([1.0, 1.0, 0.01, 30.0, 0.0], p=[0.4, 0.2, 0.15, 0.15, 0.1])
        yield (whole * chance.normal(size=size) * magnitudes).astype(np.float32)


def message(compressor, gradient, case):
    """(quantised, scale) of a gradient, after a look at their form."""
    kept = gradient.copy()
    with np.errstate(all="ignore"):
        quantised, scale = compressor.compress(gradient)
    assert np.array_equal(gradient, kept), f"{case}: compress changed the gradient"
    assert isinstance(quantised, np.ndarray) and quantised.dtype == np.int8, (
        f"{case}: quantised is {getattr(quantised, 'dtype', type(quantised).__name__)}, not int8"
    )
    assert quantised.shape == gradient.shape, f"{case}: quantised has the shape {quantised.shape}"
    assert isinstance(scale, float), f"{case}: the scale is a {type(scale).__name__}, no float"
    assert np.isfinite(scale), f"{case}: the scale is {scale}"
    assert quantised.min(initial=0) >= -127, f"{case}: {quantised.min()} is outside -127 to 127"
    return quantised, scale


def assert_nearest(quantised, scale, wanted, case):
    """`wanted` is what was to be sent, in float64."""
    expected = np.abs(wanted).max(initial=0.0) / 127
    assert abs(scale - expected) <= 1e-4 * expected, (
        f"{case}: the scale is {scale:.6g}, and the largest magnitude / 127 is {expected:.6g}"
    )
    if scale:
        worst = np.abs(quantised.astype(np.float64) * scale - wanted).max() / scale
        assert worst < 0.5 + STEP_ROUNDING, (
            f"{case}: a value is {worst:.4g} steps away from what was sent; rounding to the "
            "nearest leaves at most half a step"
        )
    else:
        assert not quantised.any(), f"{case}: the scale is 0, and quantised is not zero"


def test_each_message_is_within_half_a_step(student, chance):
    for number in range(40):
        length = int(chance.choice([1, 2, 3, 64, 257, 1000]))
        [gradient] = gradients(chance, 1, length)
        case = f"gradient {number}, of {length} values, of a new compressor"
        quantised, scale = message(student.make_compressor(length), gradient, case)
        assert_nearest(quantised, scale, gradient.astype(np.float64), case)


def test_what_was_sent_sums_to_what_was_given(student, chance):
    for _ in range(6):
        length = int(chance.choice([1, 3, 257, 600]))
        compressor = student.make_compressor(length)
        left = np.zeros(length)  # what was given and not sent, in float64
        buffer = np.zeros(length, dtype=np.float32)  # each gradient comes in the same memory
        for step, gradient in enumerate(gradients(chance, 60, length)):
            case = f"{length} values, gradient {step} of a compressor"
            wanted = left + gradient
            buffer[:] = gradient
            quantised, scale = message(compressor, buffer, case)
            assert_nearest(quantised, scale, wanted, f"{case}, with what was left over before")
            left = wanted - quantised.astype(np.float64) * scale
            # float32 may lose a little in each sum: what it keeps is compared, and taken over
            residual = np.array(compressor.residual, dtype=np.float64)
            assert residual.shape == left.shape and compressor.residual.dtype == np.float32, (
                f"{case}: the residual is {compressor.residual.dtype} {residual.shape}"
            )
            off = np.abs(residual - left).max()
            assert off <= 1e-5 * np.abs(wanted).max(), (
                f"{case}: the residual is {off:.3g} away from what was given and not yet sent; "
                "what cannot be sent now must be sent later"
            )
            left = residual


def test_small_gradients_get_through_in_time(student, chance):
    # next to 1.0 a step is 1/127: a gradient of 0.001 alone would be rounded to nothing, always
    small = [0.001, -0.0005, *(10.0 ** chance.uniform(-5, -2.5, 3)).round(6).tolist()]
    given = np.array([1.0, *small], dtype=np.float32)
    compressor = student.make_compressor(len(given))
    sent = np.zeros(len(given))
    for step in range(1000):
        quantised, scale = message(compressor, given.copy(), f"step {step}")
        sent += quantised.astype(np.float64) * scale
    for place, value in enumerate(given.tolist()):
        assert abs(sent[place] - 1000 * value) < 0.01, (
            f"1,000 gradients of {value:.4g} beside others of 1: {sent[place]:.4g} was sent in "
            f"all, expected {1000 * value:.4g} to within a step"
        )
    left = np.array(compressor.residual, dtype=np.float64)
    quantised, scale = message(compressor, np.zeros(len(given), dtype=np.float32), "then zeros")
    assert_nearest(quantised, scale, left, "a gradient of zeros, when something was left over")


def test_zeros_and_the_callers_arrays(student, chance):
    for length in (0, 1, 4):
        case = f"a gradient of zeros, {length} of them"
        compressor = student.make_compressor(length)
        for _ in range(2):
            quantised, scale = message(compressor, np.zeros(length, dtype=np.float32), case)
            assert scale == 0 and not quantised.any(), f"{case}: {quantised.tolist()}, {scale=}"
            assert not np.asarray(compressor.residual).any(), f"{case}: something was left over"
    compressor, other = student.make_compressor(5), student.make_compressor(5)
    first_given, second_given = gradients(chance, 2, 5)
    first_given += np.float32(1.0)
    first, _ = message(compressor, first_given, "the first gradient")
    copied = first.copy()
    message(compressor, second_given, "the second gradient")
    assert np.array_equal(first, copied), "a later compress changed the message before it"
    assert not np.asarray(other.residual).any(), "a new compressor begins with another's residual"
    again, scale = message(other, first_given, "the first gradient, of another compressor")
    assert_nearest(again, scale, first_given.astype(np.float64), "two compressors by turns")
