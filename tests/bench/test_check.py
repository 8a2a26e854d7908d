"""Checks hold exactly when they should: a false `ok` is the worst bug that the bench can have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distlab import check

finite = st.floats(-1e6, 1e6)
matrices = arrays(np.float64, array_shapes(max_dims=3, max_side=4), elements=finite)


@given(expected=matrices, tolerance=st.floats(1e-9, 1e3), data=st.data())
def test_close_is_decided_by_the_one_largest_difference(expected, tolerance, data):
    index = data.draw(st.integers(0, expected.size - 1))
    for factor, ok in ((0.5, True), (2.0, False)):
        actual = expected.copy()
        actual.flat[index] += factor * tolerance
        # Adding to a number of up to 1e6 rounds by up to 1.2e-10: far less than half of 1e-9.
        assert check.close("x", actual, expected, tolerance).ok is ok
        assert check.close("x", expected, actual, tolerance).ok is ok


@given(expected=matrices)
def test_anything_is_close_and_equal_to_itself(expected):
    assert check.close("x", expected, expected.copy(), 0.0).ok
    assert check.equal("x", expected, expected.copy()).ok
    assert check.close("x", {"a": [expected]}, {"a": (expected,)}, 0.0).ok
    assert check.close("x", torch.from_numpy(expected), expected, 0.0).ok


@given(expected=matrices, data=st.data())
def test_one_nan_fails_wherever_it_stands(expected, data):
    index = data.draw(st.integers(0, expected.size - 1))
    wrong = expected.copy()
    wrong.flat[index] = math.nan
    for relative in (False, True):
        assert not check.close("x", wrong, expected, math.inf, relative).ok
        assert not check.close("x", expected, wrong, math.inf, relative).ok
        assert not check.close("x", wrong, wrong, math.inf, relative).ok
        assert not check.close("x", [expected, wrong], [expected, expected], 1.0, relative).ok
    assert not check.equal("x", wrong, wrong).ok


@given(value=st.floats(1e-6, 1e6), scale=st.floats(1e-6, 1e6))
def test_relative_close_does_not_change_with_the_scale(value, scale):
    expected = np.array([value, -value / 2]) * scale
    assert check.close("x", expected * 1.0005, expected, 1e-3, relative=True).ok
    assert not check.close("x", expected * 1.002, expected, 1e-3, relative=True).ok


def test_relative_close_divides_by_the_largest_magnitude_of_each_array():
    expected = {"big": np.array([1e6, 1.0]), "small": np.array([1e-6])}
    near = {"big": np.array([1e6, 2.0]), "small": np.array([1e-6])}
    far = {"big": np.array([1e6, 1.0]), "small": np.array([2e-6])}
    assert check.close("x", near, expected, 1e-5, relative=True).ok
    failed = check.close("x", far, expected, 1e-5, relative=True)
    assert not failed.ok and "at small" in failed.detail
    assert check.close("x", [0.0], [0.0], 0.0, relative=True).ok
    assert not check.close("x", [1e-300], [0.0], 1.0, relative=True).ok


def test_equal_infinities_are_close_and_hide_nothing_else():
    mask = np.array([-np.inf, 0.0, 1.0])
    assert check.close("x", mask, mask.copy(), 1e-9).ok
    assert check.close("x", mask, mask.copy(), 1e-9, relative=True).ok
    for relative in (False, True):
        assert not check.close("x", [-np.inf, 0.5, 1.0], list(mask), 1e-3, relative).ok
        assert not check.close("x", mask + np.array([0, 0.5, 0]), mask, 1e-3, relative).ok
        assert not check.close("x", np.array([np.inf, 0, 1]), mask, 1e9, relative).ok
        assert not check.close("x", np.array([1.0, 0, 1]), mask, 1e9, relative).ok


@given(value=st.integers(-(2**62), 2**62), step=st.sampled_from([-1, 1]))
def test_integers_are_compared_exactly(value, step):
    for make in (int, np.int64, lambda v: np.array([v]), lambda v: torch.tensor([v])):
        assert check.equal("x", make(value), make(value)).ok
        assert not check.equal("x", make(value + step), make(value)).ok
        assert check.close("x", make(value), make(value), 0).ok
        assert not check.close("x", make(value + step), make(value), 0).ok
    assert check.close("x", value + step, value, 1).ok


def test_integers_beyond_64_bits_and_unsigned_ones():
    assert not check.close("x", np.uint8([3]), np.uint8([5]), 1).ok
    assert check.close("x", np.uint8([3]), np.uint8([5]), 2).ok
    assert not check.equal("x", 2**70 + 1, 2**70).ok
    assert not check.close("x", 2**70 + 1, 2**70, 0).ok


def test_the_imaginary_part_counts():
    assert not check.close("x", np.array([1 + 1j]), np.array([1 + 0j]), 0.5).ok
    assert check.close("x", np.array([1 + 1j]), np.array([1 + 1j]), 0.0).ok
    assert not check.close("x", torch.tensor([1 + 1j]), torch.tensor([1 + 0j]), 0.5).ok


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (np.zeros(3), np.zeros((3, 1)), "value has shape (3,), expected (3, 1)"),
        (np.zeros(1), 0.0, "value has shape (1,), expected ()"),
        (0.0, np.zeros(1), "value has shape (), expected (1,)"),
        ([1.0, 2.0], [1.0], "value has another length than the 1 expected"),
        ([1.0], [1.0, 2.0], "value has another length than the 2 expected"),
        (1.0, [1.0], "value has another length than the 1 expected"),
        ({"a": 1.0}, {"b": 1.0}, "value has other names than expected"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "value has other names than expected"),
        (
            {"w": [np.zeros(2), np.zeros(2)]},
            {"w": [np.zeros(2), np.zeros(3)]},
            "w.[1] has shape (2,), expected (3,)",
        ),
    ],
)
def test_another_form_fails_and_says_where(actual, expected, words):
    for made in (check.close("x", actual, expected, 1e9), check.equal("x", actual, expected)):
        assert (made.ok, made.detail) == (False, words)


def test_comparing_nothing_proves_nothing():
    for nothing in ([], {}, {"a": []}, np.zeros((0, 3)), [np.zeros(0)]):
        made = check.close("x", nothing, nothing, 1.0)
        assert (made.ok, made.detail) == (False, "there is nothing to compare")
    some = [np.zeros(0), np.zeros(2)]
    assert check.close("x", some, some, 0.0).ok  # an empty shard beside others is no fault


def test_close_says_where_the_worst_difference_is():
    made = check.close(
        "gradients", {"a": [1.0, 2.0], "b": 3.0}, {"a": [1.0, 2.5], "b": 3.1}, tolerance=1.5e-3
    )
    assert str(made) == ("check: gradients … FAILED (max diff 5.0e-01 at a.[1], tolerance 0.0015)")
    assert made.as_json() == {
        "name": "gradients",
        "ok": False,
        "detail": "max diff 5.0e-01 at a.[1], tolerance 0.0015",
    }


@pytest.mark.parametrize("tolerance", [math.nan, -1e-9])
def test_a_tolerance_that_nothing_meets_fails(tolerance):
    assert not check.close("x", 1.0, 1.0, tolerance).ok


def test_parameters_and_low_precision_tensors_are_compared_in_float64():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert check.close("x", {"w": weight}, {"w": np.ones(3)}, 0.0).ok
    half = torch.tensor([65504.0], dtype=torch.float16)
    assert check.close("x", half, -half, 131008.0).ok  # the difference itself overflows float16
    assert not check.close("x", half, -half, 131007.0).ok


@pytest.mark.parametrize(
    ("actual", "expected", "ok"),
    [
        ("a", "a", True),
        ("a", "b", False),
        (None, None, True),
        (None, 0, False),
        (True, True, True),
        ([], [], True),
        (["a", None, 1], ["a", None, 1], True),
        (["a", None, 1], ["a", None, 2], False),
        ({1, 2}, {2, 1}, True),
        (0.1 + 0.2, 0.3, False),
        (torch.tensor(3), 3, True),
        (torch.tensor(4), 3, False),
        (np.float32([0.1]), np.float64([0.1]), False),
    ],
)
def test_equal(actual, expected, ok):
    made = check.equal("x", actual, expected)
    assert made.ok is ok


def test_equal_shows_both_values_or_where_they_differ():
    assert check.equal("x", 2, 3).detail == "2, expected 3"
    assert check.equal("x", torch.tensor(2), 3).detail == "2, expected 3"
    assert check.equal("x", {"a": [1, 2]}, {"a": [1, 3]}).detail == "differs: a.[1]"
    assert check.equal("x", np.arange(1200), np.arange(1200)).detail == "1,200 values identical"


def test_below_and_above_hold_at_the_limit_and_fail_for_nan():
    assert check.below("x", 1.0, 1.0).ok and check.above("x", 1.0, 1.0).ok
    assert not check.below("x", 1.1, 1.0).ok and not check.above("x", 0.9, 1.0).ok
    assert not check.below("x", math.nan, 1.0).ok and not check.above("x", math.nan, 1.0).ok
    assert check.below("x", torch.tensor(0.5), 1.0, "nats").detail == "0.5 nats, limit 1 nats"


@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True), 1])
def test_every_verdict_is_a_plain_bool(value):
    assert check.true("x", value, "").ok is True
    assert check.below("x", np.float32(1), 2).ok is True


NOISES = {
    "normal": lambda chance, shape: chance.normal(size=shape),
    "skewed": lambda chance, shape: np.exp(2 * chance.normal(size=shape)) - 1,
    "heavy-tailed": lambda chance, shape: chance.standard_cauchy(size=shape),
}  # each with the median 0


@pytest.mark.parametrize("count", [6, 10, 25, 60])
@pytest.mark.parametrize("noise", NOISES)
def test_the_interval_covers_the_true_median_as_often_as_it_says(noise, count):
    runs = 4000
    drawn = NOISES[noise](np.random.default_rng(count), (runs, count))
    intervals = [check.quantile_interval(samples) for samples in drawn]
    covered = sum(low <= 0 <= high for low, high in intervals) / runs
    assert covered >= check.CONFIDENCE - 3 * math.sqrt(0.05 * 0.95 / runs)
    assert covered < 0.99  # and is hardly longer than it must be: of 10, a shorter one covers 89 %


def test_the_interval_is_the_one_of_the_books():
    """Ranks of the 95 % interval as tables of order statistics have them."""
    for count, k in ((6, 1), (8, 1), (9, 2), (10, 2), (25, 8), (50, 18), (100, 40), (2000, 956)):
        assert check.quantile_interval(range(1, count + 1)) == (k, count + 1 - k)
    assert check.quantile_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (-math.inf, math.inf)
    assert check.quantile_interval([2.0] * 9) == (2.0, 2.0)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("confidence", [0.95, 0.998])
def test_any_quantile_is_covered_as_often_as_said(quantile, confidence):
    runs = 4000
    drawn = np.random.default_rng(0).random((runs, 40))  # uniform: its quantiles are themselves
    intervals = [check.quantile_interval(samples, quantile, confidence) for samples in drawn]
    covered = sum(low <= quantile <= high for low, high in intervals) / runs
    assert covered >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / runs)


def test_a_quartile_has_one_end_sooner_than_the_other():
    assert check.quantile_interval([1.0, 2.0], 0.25) == (-math.inf, math.inf)
    assert check.quantile_interval([1.0, 2.0, 3.0], 0.25) == (-math.inf, 3.0)  # 0.25^3: 1.6 %
    low, high = check.quantile_interval(range(1, 14), 0.25)  # 0.75^13: 2.4 %
    assert (low, high) == (1, 7)  # seven or more of 13 below the quartile: 2.4 %
    assert check.within("time", [1.0, 1.0, 1.0], 2.0, quantile=0.25).detail == (
        "lower quartile 1, 95 % interval -inf to 1 of 3, limit 2"
    )
    slow = check.within("time", [3.0, 3.0, 3.0], 2.0, quantile=0.25)
    assert slow.ok and slow.detail.startswith("cannot tell: too few samples for an interval: ")


def verdicts(median, noise, limit, runs=1000, count=25):
    """How often a claim about a quantity with this true median is ok, failed, and not told."""
    drawn = median + noise * np.random.default_rng(0).normal(size=(runs, count))
    made = [check.within("x", list(samples), limit) for samples in drawn]
    failed = sum(not one.ok for one in made)
    unknown = sum("cannot tell" in one.detail for one in made)
    return runs - failed - unknown, failed, unknown


def test_a_noisy_claim_fails_only_where_the_interval_excludes_it():
    ok, failed, unknown = verdicts(median=0.02, noise=0.002, limit=0.03)
    assert (ok, failed, unknown) == (1000, 0, 0)
    ok, failed, unknown = verdicts(median=0.04, noise=0.002, limit=0.03)
    assert (ok, failed, unknown) == (0, 1000, 0)
    ok, failed, unknown = verdicts(median=0.02, noise=0.2, limit=0.03)  # as on a busy machine
    assert failed <= 25 and unknown > 900
    ok, failed, unknown = verdicts(median=0.03, noise=0.01, limit=0.03)  # true, by a hair
    assert failed <= 40 and unknown > 900


def test_within_tells_its_interval_and_what_could_tell_more():
    good = check.within("cost", [1.0] * 8, 3.0, unit="%")
    assert str(good) == ("check: cost … ok (median 1 %, 95 % interval 1 to 1 % of 8, limit 3 %)")
    bad = check.within("speed-up", [1.25] * 8, at_least=1.5)
    assert (bad.ok, bad.detail) == (
        False, "median 1.25, 95 % interval 1.25 to 1.25 of 8, at least 1.5 wanted"
    )  # fmt: skip
    wide = check.within("cost", list(range(9)), 3.0, more="--rounds")
    assert wide.ok and wide.detail == (
        "cannot tell: the interval covers the limit: median 4, 95 % interval 1 to 7 of 9, limit 3; "
        "take more --rounds"
    )
    few = check.within("cost", [9.0] * 5, 3.0)
    assert few.ok and few.detail == (
        "cannot tell: too few samples for an interval: median 9, 5 samples, limit 3; "
        "take more --repeats"
    )
    small = check.within("cost", [9.0] * 8, 3.0, judged=False)
    assert small.ok and small.detail.startswith("not judged at this size: median 9, ")
    both = check.within("ratio", [1.0] * 6, limit=1.1, at_least=0.9)
    assert both.ok and both.detail.endswith("at least 0.9 wanted, limit 1.1")


def test_one_claim_of_several_quantities_is_decided_by_the_worst():
    good, bad, wide = [1.0] * 12, [5.0] * 12, [float(i) for i in range(12)]
    held = check.within("ratio", {"a": [0.5] * 12, "b": good}, 3.0)
    assert (held.ok, held.detail) == (
        True, "median 1, 97.5 % interval 1 to 1 of 12, limit 3, the worst of 2 is b"
    )  # fmt: skip
    failed = check.within("ratio", {"a": wide, "b": bad, "c": good}, 3.0)
    assert not failed.ok and failed.detail.endswith("limit 3, the worst of 3 is b")
    unknown = check.within("ratio", {"a": wide, "c": good}, 3.0)
    assert unknown.ok and unknown.detail.startswith("cannot tell: the interval covers the limit: ")
    assert "the worst of 2 is a; take more" in unknown.detail
    assert not check.within("ratio", {}, 3.0).ok
    assert not check.within("ratio", {"a": good, "b": []}, 3.0).ok


def test_many_true_claims_together_fail_no_more_often_than_one():
    """Twenty quantities that are just true: of 95 % intervals one of them would miss in 40 %."""
    draw = np.random.default_rng(0)
    failed = 0
    for _ in range(500):
        family = {str(i): list(draw.normal(size=15)) for i in range(20)}
        failed += not check.within("x", family, 0.0).ok
    assert failed <= 500 * 0.05


def test_within_judges_the_quartile_that_it_is_asked_for():
    disturbed = [1.0] * 12 + [9.0] * 12  # every second call was interrupted
    assert check.within("time", disturbed, 2.0, quantile=0.25).detail == (
        "lower quartile 1, 95 % interval 1 to 1 of 24, limit 2"
    )
    assert "cannot tell" in check.within("time", disturbed, 2.0).detail
    assert not check.within("time", [9.0] * 24, 2.0, quantile=0.25).ok


def test_one_run_is_said():
    assert check.below("x", 1.0, 2.0, "s", one_run=True).detail == "1 s, limit 2 s, one run"
    assert check.above("x", 3.0, 2.0, one_run=True).detail == "3, at least 2 wanted, one run"
    assert not check.below("x", 3.0, 2.0, one_run=True).ok


@pytest.mark.parametrize("samples", [[], [1.0] * 9 + [math.nan], np.full(9, math.nan)])
def test_within_fails_where_there_is_nothing_to_judge(samples):
    assert not check.within("x", samples, math.inf).ok
    assert not check.within("x", samples, math.inf, judged=False).ok


def test_a_time_at_smoke_size_is_told_and_not_judged():
    for made in (
        check.below("a step", 3.0, 2.0, "s", judged=False),
        check.above("speed", 1.0, 2.0, judged=False),
    ):
        assert made.ok and made.detail.startswith("not judged at this size: ")
    assert "3 s, limit 2 s" in check.below("a step", 3.0, 2.0, "s", judged=False).detail
