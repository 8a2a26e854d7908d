"""Many rounds of guesses, made beside the student's code: tens of thousands of calls."""

import json
import random

import numpy as np

from distlab.lab.grade_student import rig


@rig
def many_rounds(student, q, p, count, seed):
    """[guesses, tokens, whether an argument was changed] of each round, as JSON; q guesses."""
    chance = random.Random(seed)
    q, p = np.array(q, dtype=float), np.array(p, dtype=float)
    vocabulary = range(p.shape[1])
    rounds = []
    for _ in range(count):
        guesses = [chance.choices(vocabulary, row)[0] for row in q]
        handed, given = list(guesses), (q.copy(), p.copy())
        tokens = student.check_guesses(handed, *given, chance.random)
        same = handed == guesses and np.array_equal(given[0], q) and np.array_equal(given[1], p)
        rounds.append((guesses, [int(token) for token in tokens], not same))
    return json.dumps(rounds)
