"""Task 5: rounds by hand and by exact shares, then the distribution of many, by chi-squared."""

import json
import math
from collections import Counter
from itertools import product

import numpy as np
from grader_rounds import many_rounds

ROUNDS = 5_000
SIGNIFICANCE = 1e-6  # a correct answer fails so seldom, whatever the seed


def checked(student, guesses, q, p, uniform, case="a round", dtype=float):
    """The round's tokens, after a look at their form."""
    p = np.array(p, dtype=dtype)
    q = np.array(q, dtype=dtype).reshape(len(guesses), p.shape[1])
    handed, kept = list(guesses), (q.copy(), p.copy())
    tokens = student.check_guesses(handed, q, p, uniform)
    assert np.array_equal(kept[0], q) and np.array_equal(kept[1], p), f"{case}: q or p was changed"
    assert handed == list(guesses), f"{case}: the guesses were changed"
    assert isinstance(tokens, list) and all(type(token) is int for token in tokens), (
        f"{case}: expected a list of ints of Python, got {tokens!r}"
    )
    check_form(guesses, tokens, p, case)
    return tokens


def check_form(guesses, tokens, p, case):
    assert 1 <= len(tokens) <= len(guesses) + 1, (
        f"{case}: {len(guesses)} guesses gave {len(tokens)} tokens, expected 1 to "
        f"{len(guesses) + 1}"
    )
    assert all(0 <= token < len(p[0]) for token in tokens), f"{case}: tokens {tokens}"
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
        (0.5, [2], "p / q is 0.5 and so is the random number, which is not below it: refused"),
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
    )


def distribution(chance, vocabulary, zeros=0.3):
    """Probabilities, some of them 0, as multiples of 1/64: their sums and quotients are exact."""
    weights = chance.integers(1, 9, vocabulary) * (chance.random(vocabulary) >= zeros)
    weights[chance.integers(vocabulary)] += 1
    shares = np.floor(64 * weights / weights.sum())
    shares[shares.argmax()] += 64 - shares.sum()
    return shares / 64


def test_exact_shares(student, chance):
    """With 64 even numbers in place of chance, each token comes as often as its share says."""
    for number in range(12):
        vocabulary = int(chance.integers(2, 9))
        draft, target, behind = (distribution(chance, vocabulary) for _ in range(3))
        if number % 4 == 0:  # what the draft says and the target never would
            draft = np.roll(target, 1)
        guess = int(chance.choice(np.flatnonzero(draft)))
        if number % 4 == 1:  # the draft is surer of the likeliest token than the target
            guess = int(target.argmax())
            draft = (target + np.eye(vocabulary)[guess]) / 2
        accepted = min(1.0, target[guess] / draft[guess])
        sure = chance.integers(0, vocabulary, (0, 1, 5)[number // 4]).tolist()  # p and q agree
        before = np.eye(vocabulary)[sure]
        q, p = [*before, draft], [*before, target, behind]
        case = (
            f"guess {guess} behind {len(sure)} sure ones, q {draft.tolist()}, p {target.tolist()}"
        )
        dtype = np.float32 if number % 3 == 0 else np.float64
        for first in {0.0, accepted / 2, accepted * (1 - 1e-6), min(0.999, accepted + 1e-6)}:
            got = [
                checked(
                    student,
                    [*sure, guess],
                    q,
                    p,
                    fixed(*(0.5 for _ in sure), first, u),
                    case,
                    dtype,
                )
                for u in [*((np.arange(64) + 0.5) / 64).tolist(), 0.0, math.nextafter(1, 0)]
            ]
            if first < accepted:
                wanted, held = behind, [*sure, guess]
            else:
                rest = np.maximum(target - draft, 0)
                wanted, held = rest / rest.sum(), sure
            place = len(held)
            assert all(len(one) == place + 1 and one[:place] == held for one in got), (
                f"{case}: p / q is {accepted:.4g} and the random number {first:.4g}: "
                f"{'accepted' if first < accepted else 'refused'}, got {got[0]}"
            )
            assert all(wanted[one[place]] > 0 for one in got), (
                f"{case}, the random number {first:.4g}: of the tokens at place {place}, "
                f"{sorted({one[place] for one in got})}, some have no share in {wanted.tolist()}"
            )
            counts = np.bincount([one[place] for one in got[:64]], minlength=vocabulary)
            assert np.abs(counts - 64 * wanted).max() <= 2.01, (
                f"{case}, the random number {first:.4g}, and 64 even ones for the token at place "
                f"{place}: expected about {(64 * wanted).round(1).tolist()}, got {counts.tolist()}"
            )
    nearly, chances = [*np.nextafter([0.5, 0.5], 0), 0], fixed(math.nextafter(1, 0), 0.2)
    got = checked(student, [0], [[0.5, 0.5, 0]], [nearly, [0, 0, 1]], chances, "rounded")
    assert got[0] in (0, 1), f"p is q but for rounding: expected a token of p, got {got}"


def rounds(student, chance, q, p, count=ROUNDS):
    """The tokens of many rounds; q [k, vocab] and p [k + 1, vocab] are the same in each."""
    seed = int(chance.integers(2**32))
    for guesses, tokens, changed in json.loads(many_rounds(student, q, p, count, seed)):
        assert not changed, f"guesses {guesses}: the guesses, q or p were changed"
        check_form(guesses, tokens, p, "a round")
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


def floats(chance, vocabulary):
    """Probabilities above 0, of any value; none so small that a chi-squared test fails of it."""
    weights = chance.uniform(0.1, 1, vocabulary) ** 2 + 0.02
    return (weights / weights.sum()).tolist()


def test_one_guess_leaves_the_distribution_as_it_is(student, chance):
    p = [[0.1, 0.4, 0.3, 0.15, 0.05], [0.2] * 5]
    for name, target, q in (
        ("a draft that is close", p, [[0.2, 0.35, 0.25, 0.1, 0.1]]),
        ("a draft that is the opposite", p, [[0.5, 0.05, 0.05, 0.1, 0.3]]),
        ("a draft that knows one token", p, [[0.0, 0.0, 0.0, 0.0, 1.0]]),
        ("a random draft", [floats(chance, 6), floats(chance, 6)], [floats(chance, 6)]),
    ):
        first = Counter(tokens[0] for tokens in rounds(student, chance, q, target))
        exact = dict(enumerate(target[0]))
        assert_distributed(first, exact, f"the first token of p {target[0]}, with {name}, {q[0]}")


def test_several_guesses_leave_it_too(student, chance):
    vocabulary = 3
    q = [floats(chance, vocabulary) for _ in range(2)]
    p = [floats(chance, vocabulary) for _ in range(3)]
    case = f"q {np.round(q, 3).tolist()}, p {np.round(p, 3).tolist()}: "
    seen = list(rounds(student, chance, q, p, 2 * ROUNDS))
    for place in range(3):
        here = Counter(tokens[place] for tokens in seen if len(tokens) > place)
        exact = dict(enumerate(p[place]))
        assert_distributed(here, exact, f"{case}token {place} where there is one")
    pairs = Counter((tokens[0], tokens[1]) for tokens in seen if len(tokens) > 1)
    assert pairs, f"{case}{2 * ROUNDS:,} rounds, and no first guess was ever accepted"
    # Given that the first guess held it is min(p, q) that it is distributed by.
    overlap = np.minimum(p[0], q[0])
    exact = {
        (a, b): overlap[a] / overlap.sum() * p[1][b]
        for a, b in product(range(vocabulary), repeat=2)
    }
    assert_distributed(pairs, exact, f"{case}the first two tokens of a round of two or more")
    held = [float(np.minimum(a, b).sum()) for a, b in zip(p, q, strict=False)]
    lengths = Counter(map(len, seen))
    exact = {1: 1 - held[0], 2: held[0] * (1 - held[1]), 3: held[0] * held[1]}
    assert_distributed(lengths, exact, f"{case}tokens of a round (as many guesses must hold as p "
                       "and q overlap)")  # fmt: skip
    greedy_models_and_good_drafts(student, chance)


def greedy_models_and_good_drafts(student, chance):
    p = [floats(chance, 4) for _ in range(4)]
    for number, tokens in enumerate(rounds(student, chance, p[:3], p, 1000)):
        assert len(tokens) == 4, (
            f"round {number}: the draft is the target itself, so every guess holds; got {tokens}"
        )
    one = np.eye(4)
    for wanted, guessed in product(product(range(4), repeat=3), product(range(4), repeat=2)):
        tokens = checked(
            student, list(guessed), one[list(guessed)], one[list(wanted)], lambda: chance.random()
        )
        agree = next((i for i, g in enumerate(guessed) if g != wanted[i]), 2)
        assert tokens == list(wanted[: agree + 1]), (
            f"a greedy target says {list(wanted)} and a greedy draft {list(guessed)}: expected "
            f"{list(wanted[: agree + 1])}, got {tokens}"
        )
