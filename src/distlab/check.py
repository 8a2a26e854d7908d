"""Named checks: a script proves its own claim, and says with which value and tolerance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

UNJUDGED = "not judged at this size: "  # what a smoke run says of a time, which shows no speed
CONFIDENCE = 0.95  # of the interval by which a noisy quantity is judged


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and the value that decided it."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"check: {self.name} … {'ok' if self.ok else 'FAILED'} ({self.detail})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def close(name: str, actual: Any, expected: Any, tolerance: float, relative: bool = False) -> Check:
    """`actual` equals `expected` to `tolerance`: numbers, arrays, tensors, lists and dicts of them.

    With `relative` each difference is divided by the largest magnitude in its expected array.
    Differing shapes, names or counts fail; so does a NaN on either side.
    """
    if (mismatch := _structure_mismatch(actual, expected)) is not None:
        return Check(name, False, mismatch)
    differences = {
        path: _difference(got, want, relative) for path, got, want in _pairs(actual, expected)
    }
    if not differences or not any(want.size for _, _, want in _pairs(actual, expected)):
        return Check(name, False, "there is nothing to compare")
    where = max(differences, key=lambda path: np.nan_to_num(differences[path], nan=np.inf))
    worst = differences[where]
    kind = "max relative diff" if relative else "max diff"
    ok = worst <= tolerance  # False for NaN
    place = f" at {where}" if where and not ok else ""
    return Check(name, ok, f"{kind} {worst:.1e}{place}, tolerance {tolerance:g}")


def _difference(got: np.ndarray, want: np.ndarray, relative: bool) -> float:
    """The largest absolute difference, in units of the largest expected magnitude if `relative`.

    Equal infinities do not differ, and are no magnitude to divide by.
    """
    if not want.size:
        return 0.0
    exact = got.dtype.kind in "biuO" and want.dtype.kind in "biuO"  # Python's own whole numbers
    common = object if exact else np.result_type(got, want, np.float64)
    got, want = got.astype(common), want.astype(common)
    with np.errstate(invalid="ignore"):
        largest = float(np.max(np.where(got == want, 0, np.abs(got - want))))
    if not relative:
        return largest
    sizes = np.abs(want).astype(np.float64)
    scale = np.max(sizes, where=np.isfinite(sizes), initial=np.finfo(np.float64).tiny)
    return largest / float(scale)


def equal(name: str, actual: Any, expected: Any) -> Check:
    """`actual == expected`, exactly; NaN equals nothing."""
    if (mismatch := _structure_mismatch(actual, expected)) is not None:
        return Check(name, False, mismatch)
    if isinstance(expected, str | bytes | bool | int) or expected is None:
        shown = repr(actual.item() if hasattr(actual, "item") else actual)
        same = bool(actual == expected)
        return Check(name, same, shown if same else f"{shown}, expected {expected!r}")
    pairs = list(_pairs(actual, expected))
    wrong = [path or "value" for path, got, want in pairs if not np.array_equal(got, want)]
    count = sum(got.size for _, got, _ in pairs)
    detail = f"{count:,} values identical" if not wrong else f"differs: {', '.join(wrong[:3])}"
    return Check(name, not wrong, detail)


def below(name: str, value: float, limit: float, unit: str = "", judged: bool = True) -> Check:
    """`value <= limit`; with `judged` false the numbers are told and never fail."""
    suffix = f" {unit}" if unit else ""
    told = f"{value:.4g}{suffix}, limit {limit:.4g}{suffix}"
    return Check(name, bool(value <= limit), told) if judged else Check(name, True, UNJUDGED + told)


def above(name: str, value: float, limit: float, unit: str = "", judged: bool = True) -> Check:
    """`value >= limit`; with `judged` false the numbers are told and never fail."""
    suffix = f" {unit}" if unit else ""
    told = f"{value:.4g}{suffix}, at least {limit:.4g}{suffix} wanted"
    return Check(name, bool(value >= limit), told) if judged else Check(name, True, UNJUDGED + told)


def within(
    name: str,
    samples: Sequence[float],
    limit: float = math.inf,
    at_least: float = -math.inf,
    unit: str = "",
    more: str = "--repeats",
    judged: bool = True,
) -> Check:
    """The median of a noisy quantity is between `at_least` and `limit`; noise alone fails nothing.

    For times and ratios. `samples` are independent measurements of it; of two things compared,
    each sample is the ratio of a pair measured one right after the other (`Timing.ratios`). The
    claim is judged by `median_interval`: it fails only when the whole interval is outside, and
    when a limit lies within the interval the detail says that it cannot tell, and that `more` of
    them could. With `judged` false the numbers are told and never fail, as at smoke size.
    """
    if not len(samples):
        return Check(name, False, "there is no sample")
    if np.isnan(samples).any():
        return Check(name, False, "a sample is not a number")
    suffix = f" {unit}" if unit else ""
    low, high = median_interval(samples)
    limits = [f"at least {at_least:.4g}{suffix} wanted"] if at_least > -math.inf else []
    limits += [f"limit {limit:.4g}{suffix}"] if limit < math.inf else []
    where = f"{100 * CONFIDENCE:g} % interval {low:.4g} to {high:.4g}{suffix} of {len(samples)}"
    why = "the interval covers the limit"
    if math.isinf(low):
        where, why = f"{len(samples)} samples", "too few samples for an interval"
    told = f"median {float(np.median(samples)):.4g}{suffix}, {where}, {', '.join(limits)}"
    if not judged:
        return Check(name, True, UNJUDGED + told)
    if low > limit or high < at_least:
        return Check(name, False, told)
    if low < at_least or high > limit:
        return Check(name, True, f"cannot tell: {why}: {told}; take more {more}")
    return Check(name, True, told)


def median_interval(
    samples: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Where the median of what was sampled lies, whatever its distribution.

    The k-th smallest and the k-th largest sample. A sample is below the median with probability
    1/2, so the median is outside when fewer than k of n tosses of a coin are heads, or tails; k is
    the largest for which that is rarer than 1 - `confidence`. (-inf, inf) when there are too few
    samples for any: 95 % needs 6. Source: David and Nagaraja, Order Statistics, section 7.1.
    """
    count, outside, k = len(samples), 0, 0
    while k < count // 2:
        outside += math.comb(count, k)
        if 2 * outside / 2**count > 1 - confidence:
            break
        k += 1
    ordered = sorted(float(value) for value in samples)
    return (ordered[k - 1], ordered[count - k]) if k else (-math.inf, math.inf)


def true(name: str, ok: bool, detail: str) -> Check:
    """`ok`, with the evidence in words."""
    return Check(name, bool(ok), detail)


def _structure_mismatch(actual: Any, expected: Any, path: str = "") -> str | None:
    """Where the two are not of the same form, in words; None where they are."""
    here = path or "value"
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or actual.keys() != expected.keys():
            return f"{here} has other names than expected"
        children = [(str(key), actual[key], expected[key]) for key in expected]
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        if not isinstance(actual, Sequence) or len(actual) != len(expected):
            return f"{here} has another length than the {len(expected)} expected"
        children = [(f"[{i}]", a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    else:
        got, want = getattr(actual, "shape", ()), getattr(expected, "shape", ())
        if tuple(got) != tuple(want):
            return f"{here} has shape {tuple(got)}, expected {tuple(want)}"
        return None
    for name, a, e in children:
        if (mismatch := _structure_mismatch(a, e, f"{path}.{name}".strip("."))) is not None:
            return mismatch
    return None


def _pairs(actual: Any, expected: Any, path: str = "") -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Every leaf of the two equally formed values, as float64 (or unchanged integer) arrays."""
    if isinstance(expected, Mapping):
        children = [(str(key), actual[key], expected[key]) for key in expected]
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        children = [(f"[{i}]", a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    else:
        return [(path, _as_array(actual), _as_array(expected))]
    return [leaf for name, a, e in children for leaf in _pairs(a, e, f"{path}.{name}".strip("."))]


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not imported for NumPy scripts
        value = value.detach().cpu().resolve_conj()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else array
