"""Named checks: a script proves its own claim, and says with which value and tolerance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

UNJUDGED = "not judged at this size: "  # what a smoke run says of a time, which shows no speed
ONE_RUN = ", one run"  # of a time whose noise nobody knows
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


def below(
    name: str,
    value: float,
    limit: float,
    unit: str = "",
    judged: bool = True,
    one_run: bool = False,
) -> Check:
    """`value <= limit`; with `judged` false the numbers are told and never fail.

    `one_run`: a time or rate that was measured once, so that nobody knows its noise: it is said.
    """
    suffix = f" {unit}" if unit else ""
    told = f"{value:.4g}{suffix}, limit {limit:.4g}{suffix}" + ONE_RUN * one_run
    return Check(name, bool(value <= limit), told) if judged else Check(name, True, UNJUDGED + told)


def above(
    name: str,
    value: float,
    limit: float,
    unit: str = "",
    judged: bool = True,
    one_run: bool = False,
) -> Check:
    """`value >= limit`; `judged` and `one_run` as in `below`."""
    suffix = f" {unit}" if unit else ""
    told = f"{value:.4g}{suffix}, at least {limit:.4g}{suffix} wanted" + ONE_RUN * one_run
    return Check(name, bool(value >= limit), told) if judged else Check(name, True, UNJUDGED + told)


def within(
    name: str,
    samples: Sequence[float] | Mapping[str, Sequence[float]],
    limit: float = math.inf,
    at_least: float = -math.inf,
    unit: str = "",
    more: str = "--repeats",
    judged: bool = True,
    quantile: float = 0.5,
) -> Check:
    """The median of a noisy quantity is between `at_least` and `limit`; noise alone fails nothing.

    For times and ratios. `samples` are independent measurements of it; of two things compared,
    each sample is the ratio of a pair measured one right after the other (`Timing.ratios`). The
    claim is judged by `quantile_interval`: it fails only when the whole interval is outside, and
    when a limit lies within the interval the detail says that it cannot tell, and that `more` of
    them could. With `judged` false the numbers are told and never fail, as at smoke size.

    A mapping holds the samples of several quantities, of all of which the claim is made: one that
    fails fails it, and the worst one is told. Of m intervals each misses with a chance of 5 % / m,
    so that any does with 5 % at most (Bonferroni). `quantile` 0.25 judges the lower quartile
    instead of the median, where what disturbs a measurement can only add to it.
    """
    family = samples if isinstance(samples, Mapping) else {"": samples}
    if not family or not all(len(own) for own in family.values()):
        return Check(name, False, "there is no sample")
    if any(np.isnan(own).any() for own in family.values()):
        return Check(name, False, "a sample is not a number")
    confidence = 1 - (1 - CONFIDENCE) / len(family)
    judgements = [
        _Judgement(of, own, limit, at_least, quantile, confidence) for of, own in family.items()
    ]
    worst = max(judgements, key=lambda one: (one.failed, one.unknown, one.beyond))
    told = worst.told(unit, len(family))
    if not judged:
        return Check(name, True, UNJUDGED + told)
    if worst.unknown:
        return Check(name, True, f"cannot tell: {worst.why}: {told}; take more {more}")
    return Check(name, not worst.failed, told)


class _Judgement:
    """One quantity's samples beside the limits: outside, inside, or not to be told."""

    def __init__(
        self,
        of: str,
        samples: Sequence[float],
        limit: float,
        at_least: float,
        quantile: float,
        confidence: float,
    ) -> None:
        self.of, self.count, self.limit, self.at_least = of, len(samples), limit, at_least
        self.quantile, self.confidence = quantile, confidence
        self.low, self.high = quantile_interval(samples, quantile, confidence)
        self.value = float(np.quantile(samples, quantile))
        self.failed = self.low > limit or self.high < at_least
        self.unknown = not self.failed and (self.low < at_least or self.high > limit)
        self.beyond = max(self.value - limit, at_least - self.value)  # below 0 where it is inside
        few = math.isinf(self.low) or math.isinf(self.high)
        self.why = "too few samples for an interval" if few else "the interval covers the limit"

    def told(self, unit: str, family: int) -> str:
        suffix = f" {unit}" if unit else ""
        what = {0.25: "lower quartile", 0.5: "median", 0.75: "upper quartile"}.get(
            self.quantile, f"quantile {self.quantile:g}"
        )
        where = f"{self.count} samples"
        if not (math.isinf(self.low) and math.isinf(self.high)):
            percent = f"{100 * self.confidence:.3g} %"
            where = f"{percent} interval {self.low:.4g} to {self.high:.4g}{suffix} of {self.count}"
        limits = []
        if self.at_least > -math.inf:
            limits.append(f"at least {self.at_least:.4g}{suffix} wanted")
        if self.limit < math.inf:
            limits.append(f"limit {self.limit:.4g}{suffix}")
        worst = [f"the worst of {family} is {self.of}"] if self.of else []
        told = [f"{what} {self.value:.4g}{suffix}", where, *limits, *worst]
        return ", ".join(told)


def quantile_interval(
    samples: Sequence[float], quantile: float = 0.5, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Where the `quantile` of what was sampled lies (the median), whatever its distribution.

    Two of the samples in order. One is below the quantile with the probability `quantile`, so the
    number of those below it is binomial. The lower end is the k-th smallest, with the largest k for
    which fewer than k below are rarer than (1 - `confidence`) / 2; the upper end likewise from
    above. An end is infinite where there are too few samples for it: the median's 95 % needs 6.
    Source: David and Nagaraja, Order Statistics, section 7.1.
    """
    below, above = (
        _rank_beyond(len(samples), chance, (1 - confidence) / 2)
        for chance in (quantile, 1 - quantile)
    )
    ordered = sorted(float(value) for value in samples)
    return (
        ordered[below - 1] if below else -math.inf,
        ordered[len(ordered) - above] if above else math.inf,
    )


def _rank_beyond(count: int, chance: float, rare: float) -> int:
    """The largest k for which fewer than k of `count` successes are no likelier than `rare`."""
    fewer, k = 0.0, 0
    while k < count:
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        fewer += math.exp(ways + k * math.log(chance) + (count - k) * math.log(1 - chance))
        if fewer > rare:
            break
        k += 1
    return k


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
