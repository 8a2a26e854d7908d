"""Task 6: small distributions by hand, large ones by the definition, draws by their frequencies."""

import numpy as np

TOLERANCE = 1e-9


def cut(student, logits, temperature=1.0, top_p=1.0):
    logits = np.asarray(logits)
    kept = logits.copy()
    with np.errstate(all="ignore"):
        got = np.asarray(student.nucleus(logits, temperature, top_p))
    assert np.array_equal(logits, kept), "the logits were changed"
    return got


def assert_cut(student, logits, temperature, top_p, expected, case):
    got = cut(student, logits, temperature, top_p)
    shown = f"{case}: temperature {temperature}, top_p {top_p}"
    assert got.shape == np.shape(expected), f"{shown}: the shape is {got.shape}"
    assert np.isfinite(got).all(), f"{shown}: nan or inf in {got[:8].tolist()}"
    assert np.abs(got - expected).max() < TOLERANCE, (
        f"{shown}: expected {np.round(expected, 4)[:8].tolist()}, got "
        f"{np.round(got, 4)[:8].tolist()}"
    )


def logs(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def test_the_smallest_set_that_reaches_p(student):
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
    equal = np.zeros(8)
    assert_cut(student, equal, 1.0, 0.5, np.repeat([0.25, 0.0], 4),
               "eight equal tokens, 0.5 wanted: the first four make it exactly")  # fmt: skip
    assert_cut(student, equal, 1.0, 0.45, np.repeat([0.25, 0.0], 4), "eight equal tokens")


def test_temperature_comes_first(student):
    logits = logs(0.5, 0.3, 0.2)
    for temperature in (0.5, 1.0, 2.0):
        warm = np.exp(logits / temperature)
        warm /= warm.sum()
        assert_cut(student, logits, temperature, 1.0, warm, "nothing is cut off")
    # at 0.5: 0.658, 0.237, 0.105; at 2: 0.415, 0.322, 0.263
    assert_cut(student, logits, 0.5, 0.65, [1, 0, 0],
               "cold, the first token alone has 0.658")  # fmt: skip
    warm = np.sqrt([0.5, 0.3, 0.2])
    assert_cut(student, logits, 2.0, 0.75, warm / warm.sum(),
               "warm, the first two have 0.737 only")  # fmt: skip
    assert_cut(student, np.array([1.0, 3.0, 3.0, 2.0]), 0, 0.9, [0, 1, 0, 0],
               "greedy, the first of two largest")  # fmt: skip


def test_extreme_arguments(student):
    high = 1 / (1 + np.exp(-1))
    large = np.array([5000.0, 4999.0, -5000.0])
    assert_cut(student, large, 1.0, 1.0, [high, 1 - high, 0], "logits of several thousand")
    assert_cut(student, logs(0.6, 0.0, 0.4), 1.0, 1.0, [0.6, 0, 0.4], "a logit of -inf")
    assert_cut(student, logs(0.6, 0.0, 0.4), 0, 1.0, [1, 0, 0], "a logit of -inf, greedy")
    assert_cut(student, logs(0.6, 0.0, 0.4), 1.0, 1e-9, [1, 0, 0], "one token always stays")
    assert_cut(student, np.array([3.0]), 1.0, 0.5, [1.0], "a vocabulary of one")
    chance = np.random.default_rng(3)
    for dtype in (np.float16, np.float32, np.float64):
        logits = (3 * chance.normal(size=5000)).astype(dtype)
        assert_cut(student, logits, 1.0, 0.9, by_definition(logits, 0.9),
                   f"5,000 logits of {np.dtype(dtype).name}")  # fmt: skip
        total = cut(student, logits, 1.0, 1.0).sum()
        assert abs(total - 1) < TOLERANCE, f"5,000 {np.dtype(dtype).name}: they sum to {total}"


def by_definition(logits, top_p):
    p = np.exp(logits.astype(np.float64) - float(logits.max()))
    p /= p.sum()
    kept, total = np.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
        if total >= top_p:
            break
        kept[token] = p[token]
        total += p[token]
    return kept / kept.sum()


def test_draws_have_the_right_frequencies(student):
    p = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for uniform, expected in ((0.0, 1), (0.2, 1), (0.25, 3), (0.6, 3), (0.75, 4), (0.999, 4)):
        got = student.draw(p.copy(), uniform)
        assert got == expected, (
            f"probabilities {p.tolist()}, uniform {uniform}: expected token {expected}, got {got}"
        )
    short = np.array([0.5, 0.5 - 1e-9, 0.0])
    got = student.draw(short, 1 - 1e-12)
    assert got == 1, (
        "the probabilities sum to a little less than uniform: expected the last token of a "
        f"probability above 0, 1, got {got}"
    )
    chance = np.random.default_rng(5)
    weights = chance.random(7)
    weights[3] = 0
    p = weights / weights.sum()
    draws = np.array([student.draw(p, number) for number in np.arange(10_000) / 10_000])
    for token, share in enumerate(p):
        count = int((draws == token).sum())
        assert abs(count - 10_000 * share) <= 2, (
            f"10,000 even numbers from 0 to 1: token {token} of probability {share:.4f} was drawn "
            f"{count} times"
        )
