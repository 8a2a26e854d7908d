"""Task 5: rounds by hand, then the distribution of many against the target's, by chi-squared."""

import json
import math
import random
from collections import Counter
from itertools import product

import numpy as np
from grader_rounds import many_rounds

ROUNDS = 20_000
SEED = 7
SIGNIFICANCE = 1e-5  # a correct answer fails so seldom, with this seed or with another


def checked(student, guesses, q, p, uniform, case="a round"):
    """The round's tokens, after a look at their form."""
    p = np.array(p, dtype=float)
    q = np.array(q, dtype=float).reshape(len(guesses), p.shape[1])
    kept = q.copy(), p.copy()
    tokens = [int(token) for token in student.check_guesses(list(guesses), q, p, uniform)]
    assert np.array_equal(kept[0], q) and np.array_equal(kept[1], p), f"{case}: q or p was changed"
    check_form(guesses, tokens, p, case)
    return tokens


def check_form(guesses, tokens, p, case):
    assert 1 <= len(tokens) <= len(guesses) + 1, (
        f"{case}: {len(guesses)} guesses gave {len(tokens)} tokens, expected 1 to "
        f"{len(guesses) + 1}"
    )
    assert all(0 <= token < p.shape[1] for token in tokens), f"{case}: tokens {tokens}"
    for place, token in enumerate(tokens):
        assert p[place][token] > 0, f"{case}: token {token} at place {place}, of which p is 0"


def fixed(*values):
    """A `uniform` that gives these, and complains where more are asked for."""
    rest = list(values)

    def uniform():
        assert rest, f"uniform() was called more than {len(values)} times in a round by hand"
        return rest.pop(0)

    return uniform


def test_by_hand(student):
    q, p = [[0.5, 0.5, 0.0]], [[0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]
    for chance, expected, why in (
        (0.4, [0, 1], "p / q is 0.5 and the random number 0.4: accepted, and p[1] gives 1"),
        (0.6, [2], "p / q is 0.5 and the random number 0.6: refused; only 2 has more in p than in "
                   "q"),
        (0.0, [0, 1], "a random number of 0 is below any chance: accepted"),
    ):  # fmt: skip
        got = checked(student, [0], q, p, fixed(chance, 0.3), why)
        assert got == expected, (
            f"guess 0, q {q[0]}, p {p[0]}: {why}: expected {expected}, got {got}"
        )
    got = checked(student, [], [], [[0.0, 0.0, 1.0]], fixed(0.9), "no guesses at all")
    assert got == [2], f"no guesses, and p[0] is 1 for token 2: expected [2], got {got}"
    got = checked(
        student,
        [1, 0, 2],
        [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
        [[0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]],
        fixed(0.9, 0.1, 0.5, 0.5),
        "three guesses",
    )
    assert got == [1, 2], (
        "guesses 1, 0, 2: the target would say 1 and then 2, so the second is refused and what "
        f"follows it is not looked at: expected [1, 2], got {got}"
    )  # fmt: skip
    nearly = np.nextafter([0.5, 0.5], 0)
    got = checked(
        student, [0], [[0.5, 0.5]], [nearly, [1, 0]], fixed(math.nextafter(1, 0), 0.2), "rounded"
    )
    assert got[0] in (0, 1), f"p is q but for rounding: expected a token of p, got {got}"


def rounds(student, q, p, count=ROUNDS):
    """The tokens of many rounds; q [k, vocab] and p [k + 1, vocab] are the same in each."""
    for guesses, tokens, changed in json.loads(many_rounds(student, q, p, count, SEED)):
        assert not changed, f"guesses {guesses}: q or p was changed"
        check_form(guesses, tokens, np.asarray(p), "a round")
        yield tokens


def assert_distributed(counts, exact, case):
    """Pearson's chi-squared test; `exact` maps outcomes to probabilities above 0."""
    total = sum(counts.values())
    statistic = sum(
        (counts[x] - total * share) ** 2 / (total * share) for x, share in exact.items()
    )
    freedom = len(exact) - 1
    # Wilson and Hilferty's normal approximation of chi-squared's upper tail
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    chance = math.erfc(z / math.sqrt(2)) / 2
    worst = max(exact, key=lambda x: abs(counts[x] - total * exact[x]) / math.sqrt(exact[x]))
    assert chance > SIGNIFICANCE, (
        f"{case}: {worst} came {counts[worst]} times in {total:,} rounds, and the target's "
        f"distribution asks for about {total * exact[worst]:.0f} (chi-squared {statistic:.0f} with "
        f"{freedom} degrees of freedom)"
    )


def test_one_guess_leaves_the_distribution_as_it_is(student):
    p = [[0.1, 0.4, 0.3, 0.15, 0.05], [0.2] * 5]
    for name, q in (
        ("a draft that is close", [[0.2, 0.35, 0.25, 0.1, 0.1]]),
        ("a draft that is the opposite", [[0.5, 0.05, 0.05, 0.1, 0.3]]),
        ("a draft that knows one token", [[0.0, 0.0, 0.0, 0.0, 1.0]]),
    ):
        first = Counter(tokens[0] for tokens in rounds(student, q, p))
        assert_distributed(first, dict(enumerate(p[0])), f"the first token, with {name}")


def test_several_guesses_leave_it_too(student):
    q = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]
    p = [[0.3, 0.3, 0.4], [0.5, 0.1, 0.4], [0.1, 0.7, 0.2]]
    seen = list(rounds(student, q, p, 2 * ROUNDS))
    for place in range(3):
        here = Counter(tokens[place] for tokens in seen if len(tokens) > place)
        assert_distributed(here, dict(enumerate(p[place])), f"token {place} where there is one")
    pairs = Counter((tokens[0], tokens[1]) for tokens in seen if len(tokens) > 1)
    assert pairs, "40,000 rounds, and no first guess was ever accepted"
    # Given that the first guess held it is min(p, q) that it is distributed by.
    overlap = np.minimum(p[0], q[0])
    exact = {(a, b): overlap[a] / overlap.sum() * p[1][b] for a, b in product(range(3), repeat=2)}
    assert_distributed(pairs, exact, "the first two tokens of a round of two or more")
    held = [float(np.minimum(a, b).sum()) for a, b in zip(p, q, strict=False)]
    lengths = Counter(map(len, seen))
    exact = {1: 1 - held[0], 2: held[0] * (1 - held[1]), 3: held[0] * held[1]}
    assert_distributed(lengths, exact, "tokens of a round (as many guesses must hold as p and q "
                       "overlap)")  # fmt: skip


def test_greedy_models_and_good_drafts(student):
    p = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]
    for number, tokens in enumerate(rounds(student, p[:2], p, 2000)):
        assert len(tokens) == 3, (
            f"round {number}: the draft is the target itself, so every guess holds; got {tokens}"
        )
    one = np.eye(4)
    chance = random.Random(SEED)
    for wanted, guessed in product(product(range(4), repeat=3), product(range(4), repeat=2)):
        tokens = checked(student, guessed, one[list(guessed)], one[list(wanted)], chance.random)
        agree = next((i for i, g in enumerate(guessed) if g != wanted[i]), 2)
        assert tokens == list(wanted[: agree + 1]), (
            f"a greedy target says {list(wanted)} and a greedy draft {list(guessed)}: expected "
            f"{list(wanted[: agree + 1])}, got {tokens}"
        )
