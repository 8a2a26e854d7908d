"""Task 6: small distributions by hand and by every subset, large ones by the definition, draws."""

import math
from itertools import combinations

import numpy as np

TOLERANCE = 1e-9
REACHED = 1e-12  # a sum so little below top_p has reached it


def cut(student, logits, temperature, top_p, case):
    handed = np.array(logits)
    with np.errstate(all="ignore"):
        got = student.nucleus(handed, temperature, top_p)
    assert np.array_equal(handed, logits), f"{case}: the logits were changed"
    assert isinstance(got, np.ndarray) and got.dtype == np.float64, (
        f"{case}: the result is {getattr(got, 'dtype', type(got).__name__)}, not float64"
    )
    return got


def assert_cut(student, logits, temperature, top_p, expected, case):
    logits, expected = np.asarray(logits), np.asarray(expected, dtype=float)
    shown = f"{case}: temperature {temperature}, top_p {top_p}"
    if len(logits) <= 8:
        shown += f", logits {logits.tolist()} ({logits.dtype})"
    got = cut(student, logits, temperature, top_p, shown)
    assert got.shape == expected.shape, f"{shown}: the shape is {got.shape}"
    assert np.isfinite(got).all(), f"{shown}: nan or inf in {got[:8].tolist()}"
    kept, wanted = (np.flatnonzero(array).tolist() for array in (got, expected))
    other = sorted(set(kept) ^ set(wanted))
    assert not other, (
        f"{shown}: {len(kept)} tokens are kept, expected {len(wanted)}; "
        f"{'wrongly kept' if other[0] in kept else 'missing'} is {other[0]}; expected "
        f"{np.round(expected, 4)[:8].tolist()}, got {np.round(got, 4)[:8].tolist()}"
    )
    assert np.abs(got - expected).max() < TOLERANCE, (
        f"{shown}: expected {np.round(expected, 4)[:8].tolist()}, got "
        f"{np.round(got, 4)[:8].tolist()}"
    )


def logs(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def softmax(logits, temperature):
    with np.errstate(over="ignore"):
        warm = np.exp((logits.astype(float) - float(logits.max())) / temperature)
    return warm / warm.sum()


def by_every_subset(logits, temperature, top_p):
    """Of all sets that reach top_p the smallest, then the likeliest, then that of low numbers."""
    p = softmax(logits, temperature)
    for size in range(1, len(p) + 1):
        sets = [s for s in combinations(range(len(p)), size) if p[list(s)].sum() >= top_p - REACHED]
        if sets:
            break
    levels = np.unique(p)  # sums of equal probabilities in another order differ in the last bit
    rank = np.searchsorted(levels, p).tolist()
    best = max(sets, key=lambda s: (sorted((rank[t] for t in s), reverse=True), [-t for t in s]))
    kept = np.where(np.isin(np.arange(len(p)), best), p, 0.0)
    return kept / kept.sum()


def by_definition(logits, temperature, top_p):
    p = softmax(logits, temperature)
    kept, total = np.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
        if total >= top_p - REACHED and top_p < 1:
            break
        kept[token] = p[token]
        total += p[token]
    return kept / kept.sum()


def random_logits(chance, vocabulary):
    """Of few different values as often as not, and of any float type."""
    dtype = [np.float16, np.float32, np.float64][chance.integers(3)]
    logits = chance.normal(size=vocabulary) * chance.choice([0.5, 3.0])
    if chance.random() < 0.6:
        logits = chance.integers(-2, 3, vocabulary) * 0.7
    if chance.random() < 0.3:
        logits[1:][chance.random(vocabulary - 1) < 0.3] = -np.inf
    return chance.permutation(logits + chance.choice([0.0, -50.0, 100.0])).astype(dtype)


def test_the_smallest_set_that_reaches_p(student, chance):
    logits = logs(0.1, 0.4, 0.05, 0.3, 0.15)
    for top_p, kept, why in (
        (0.75, [1, 3, 4], "0.4 + 0.3 is below 0.75, so the token that passes it belongs to it"),
        (0.69, [1, 3], "0.4 + 0.3 is enough"),
        (0.45, [1, 3], "0.4 is below 0.45"),
        (0.35, [1], "the likeliest is enough"),
        (0.96, [0, 1, 2, 3, 4], "the last one is needed too"),
        (1.0, [0, 1, 2, 3, 4], "1 keeps everything"),
    ):
        p = np.exp(logits)
        expected = np.where(np.isin(np.arange(5), kept), p, 0.0)
        assert_cut(student, logits, 1.0, top_p, expected / expected.sum(), why)
    for count in (8, 10, 64, 200):
        for kept in (1, count // 2, 4 * count // 5, int(chance.integers(1, count))):
            equal = np.where(np.arange(count) < kept, 1 / kept, 0.0)
            why = f"{count} equal tokens, of which the first {kept}"
            assert_cut(student, np.zeros(count), 1.0, kept / count, equal, f"{why} make it exactly")
            below = (kept - 0.5) / count
            assert_cut(student, np.zeros(count), 1.0, below, equal, f"{why} are needed")
    for _ in range(60):
        logits = random_logits(chance, int(chance.integers(1, 8)))
        top_p = float(chance.uniform(0.01, 1))
        expected = by_every_subset(logits, 1.0, top_p)
        assert_cut(student, logits, 1.0, top_p, expected, "the smallest of all sets")


def test_temperature_comes_first(student, chance):
    logits = logs(0.5, 0.3, 0.2)
    for temperature in (0.5, 1.0, 2.0):
        warm = softmax(logits, temperature)
        assert_cut(student, logits, temperature, 1.0, warm, "nothing is cut off")
    # at 0.5: 0.658, 0.237, 0.105; at 2: 0.415, 0.322, 0.263
    assert_cut(student, logits, 0.5, 0.65, [1, 0, 0],
               "cold, the first token alone has 0.658")  # fmt: skip
    warm = np.sqrt([0.5, 0.3, 0.2])
    assert_cut(student, logits, 2.0, 0.75, warm / warm.sum(),
               "warm, the first two have 0.737 only")  # fmt: skip
    assert_cut(student, np.array([1.0, 3.0, 3.0, 2.0]), 0, 0.9, [0, 1, 0, 0],
               "greedy, the first of two largest")  # fmt: skip
    for _ in range(60):
        logits = random_logits(chance, int(chance.integers(1, 8)))
        temperature = float(chance.choice([1e-6, 0.003, 0.01, 0.3, 0.7, 1.5, 4.0]))
        top_p = float(chance.choice([1.0, chance.uniform(0.05, 1)]))
        expected = by_every_subset(logits, temperature, top_p)
        if top_p == 1:
            expected = softmax(logits, temperature)
        assert_cut(student, logits, temperature, top_p, expected, "warmed up, then cut")
        first = np.arange(len(logits)) == logits.argmax()
        for zero in (0, 0.0):
            assert_cut(student, logits, zero, top_p, first, "greedy, the first of the largest")


def test_extreme_arguments(student, chance):
    high = 1 / (1 + np.exp(-1))
    large = np.array([5000.0, 4999.0, -5000.0])
    assert_cut(student, large, 1.0, 1.0, [high, 1 - high, 0], "logits of several thousand")
    assert_cut(student, -large, 1.0, 1.0, [0, 0, 1], "logits of minus several thousand")
    assert_cut(student, logs(0.6, 0.0, 0.4), 1.0, 1.0, [0.6, 0, 0.4], "a logit of -inf")
    assert_cut(student, logs(0.6, 0.0, 0.4), 0, 1.0, [1, 0, 0], "a logit of -inf, greedy")
    assert_cut(student, logs(0.6, 0.0, 0.4), 1.0, 1e-9, [1, 0, 0], "one token always stays")
    assert_cut(student, np.array([3.0]), 1.0, 0.5, [1.0], "a vocabulary of one")
    for dtype in (np.float16, np.float32, np.float64):
        logits = (3 * chance.normal(size=5000)).astype(dtype)
        top_p, temperature = float(chance.uniform(0.5, 0.99)), float(chance.uniform(0.5, 2))
        for cold, share in ((temperature, top_p), (temperature, 1.0)):
            expected = by_definition(logits, cold, share)
            assert_cut(student, logits, cold, share, expected, f"5,000 {np.dtype(dtype).name}")
        total = cut(student, logits, 1.0, 1.0, "5,000 logits").sum()
        assert abs(total - 1) < TOLERANCE, f"5,000 {np.dtype(dtype).name}: they sum to {total}"
    for _ in range(10):
        logits = chance.integers(0, 4, 300).astype(np.float32)  # very many ties
        top_p = float(chance.uniform(0.1, 0.99))
        assert_cut(
            student, logits, 1.0, top_p, by_definition(logits, 1.0, top_p), "300, of 4 sorts"
        )


def drawn(student, p, uniform):
    handed = p.copy()
    got = student.draw(handed, uniform)
    assert np.array_equal(handed, p), "draw changed the probabilities"
    assert type(got) is int, f"a token is an int of Python, not {type(got).__name__}"
    return got


def on_the_line(p, uniform):
    """The token in which `uniform` lies, by exact sums; the last possible one behind them all."""
    possible = [token for token in range(len(p)) if p[token] > 0]
    for token in possible:
        if math.fsum(p[: token + 1].tolist()) > uniform:
            return token
    return possible[-1]


def test_draws_have_the_right_frequencies(student, chance):
    p = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for uniform, expected in ((0.0, 1), (0.2, 1), (0.25, 3), (0.6, 3), (0.75, 4), (0.999, 4)):
        got = drawn(student, p, uniform)
        assert got == expected, (
            f"probabilities {p.tolist()}, uniform {uniform}: expected token {expected}, got {got}"
        )
    for number in range(40):
        counts = chance.multinomial(64, chance.dirichlet(np.full(int(chance.integers(1, 12)), 0.5)))
        p = counts / 64  # so that borders are exact
        p = p.astype(np.float32) if number % 3 == 0 else p
        borders = [float(p[:end].sum()) for end in range(len(p))]
        for uniform in [*borders, float(chance.random()), 0.0, math.nextafter(1, 0)]:
            if uniform < 1:
                got, expected = drawn(student, p, uniform), on_the_line(p, uniform)
                assert got == expected, (
                    f"probabilities {p.tolist()}, uniform {uniform}: expected token {expected}, "
                    f"got {got}"
                )
        short = np.append(p.astype(np.float64) * (1 - 1e-9), [0.0, 0.0])
        got, expected = drawn(student, short, 1 - 1e-12), int(np.flatnonzero(short)[-1])
        assert got == expected, (
            f"{short.tolist()} sum to a little less than uniform: expected the last token of a "
            f"probability above 0, {expected}, got {got}"
        )
    weights = chance.random(7)
    weights[3] = 0
    p = weights / weights.sum()
    draws = np.array([drawn(student, p, number / 2000) for number in range(2000)])
    for token, share in enumerate(p):
        count = int((draws == token).sum())
        assert abs(count - 2000 * share) <= 2, (
            f"2,000 even numbers from 0 to 1: token {token} of probability {share:.4f} was drawn "
            f"{count} times"
        )
    p = chance.random(30_000).astype(np.float32)
    p /= p.sum(dtype=np.float64)
    ends = np.cumsum(p, dtype=np.float64)
    for token in chance.integers(1, 29_000, 30).tolist():
        got = drawn(student, p, float(ends[token] - p[token] / 2))
        assert got == token, (
            f"30,000 probabilities in float32: expected token {token}, in whose middle uniform "
            f"lies, got {got}; sum in float64"
        )
