"""Task 5: small routings by hand, drawn ones by a model that takes choice after choice."""

import math

import numpy as np

RANDOM_CASES = 25


def test_two_different_experts_and_their_weights(student, chance):
    scores = [[0.0, 2.0, 1.0], [5.0, 5.0, 5.0], [1000.0, 999.0, -1000.0], [-1000.0, 0.0, 1000.0]]
    scores = np.array(scores)
    high = 1 / (1 + math.exp(-1.0))
    check_choices(student, scores, [[1, 2], [0, 1], [0, 1], [2, 1]])
    check_weights(student, scores, [[high, 1 - high], [0.5, 0.5], [high, 1 - high], [1, 0]])
    for _ in range(RANDOM_CASES):
        scores = drawn_scores(chance)
        expected = [best_two(row) for row in scores.tolist()]
        check_choices(student, scores, expected)
        weights = []
        for row, (first, second) in zip(scores.tolist(), expected, strict=True):
            share = 1 / (1 + math.exp(row[second] - row[first]))
            weights.append([share, 1 - share])
        check_weights(student, scores, weights)


def test_no_expert_is_over_its_capacity(student, chance):
    for capacity in (0, 1, 5, 13, 100):
        check_slots(student, chance.normal(size=(40, 6)), capacity)
    for _ in range(RANDOM_CASES):
        check_slots(student, drawn_scores(chance), drawn_capacity(chance))


def test_first_choices_come_first(student, chance):
    # All want expert 0; the first two tokens only as their second choice.
    scores = np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    routing = routed(student, scores, 2)
    expected = [[0, -1], [0, -1], [0, 1], [1, 1]]
    assert np.array_equal(routing.slots, expected), (
        f"tokens 2 and 3 have expert 0 as their first choice and come before 0 and 1: the slots "
        f"are {np.asarray(routing.slots).tolist()}, expected {expected}"
    )
    for _ in range(RANDOM_CASES):
        scores, capacity = drawn_scores(chance), drawn_capacity(chance)
        routing, expected = routed(student, scores, capacity), slots_one_by_one(scores, capacity)
        chosen, pairs = np.asarray(routing.experts).tolist(), list(map(best_two, scores.tolist()))
        assert chosen == pairs, (
            f"{named(scores, capacity)}: the experts are {chosen}, expected {pairs}, whether "
            "or not there was room"
        )
        got = np.asarray(routing.slots)
        wrong = np.flatnonzero((got != expected).any(axis=1))
        assert wrong.size == 0, (
            f"{named(scores, capacity)}: token {wrong[0]} has the slots {got[wrong[0]].tolist()}, "
            f"expected {expected[wrong[0]].tolist()}; first all first choices in the order of the "
            "tokens, then all second ones"
        )


def test_dropped_tokens_are_counted(student, chance):
    cases = [(chance.normal(size=(40, 6)), capacity) for capacity in (0, 3, 9, 100)]
    cases += [(drawn_scores(chance), drawn_capacity(chance)) for _ in range(RANDOM_CASES)]
    for scores, capacity in cases:
        routing, case = routed(student, scores, capacity), named(scores, capacity)
        slots, weights = np.asarray(routing.slots), np.asarray(routing.weights)
        missing = int((slots < 0).sum())
        assert routing.dropped == missing, (
            f"{case}: {missing} choices have no slot, dropped says {routing.dropped}"
        )
        room = slots_one_by_one(scores, capacity) >= 0
        assert missing == (~room).sum(), (
            f"{case}: {missing} choices were dropped, expected {(~room).sum()}"
        )
        assert not weights[~room].any(), f"{case}: a dropped choice has a weight"
        plenty = np.asarray(routed(student, scores, 2 * len(scores)).weights)
        for token in np.flatnonzero(room.any(axis=1)):
            kept = np.where(room[token], plenty[token], 0)
            assert np.allclose(weights[token], kept, rtol=0, atol=1e-12), (
                f"{case}: token {token} has the slots {slots[token].tolist()} and the weights "
                f"{weights[token].tolist()}, expected {kept.tolist()}: a weight was scaled up or "
                "down"
            )


def routed(student, scores, capacity):
    """The routing, once its shapes and dtypes are right and the scores as they were."""
    kept = scores.copy()
    routing = student.route(scores, capacity)
    case = named(kept, capacity)
    for name in ("experts", "slots", "weights"):
        array = np.asarray(getattr(routing, name))
        wanted = np.floating if name == "weights" else np.integer
        assert array.shape == (len(kept), 2) and np.issubdtype(array.dtype, wanted), (
            f"{case}: {name} is {array.dtype} of shape {array.shape}, expected "
            f"{'float64' if name == 'weights' else 'integers'} of shape {(len(kept), 2)}"
        )
    assert routing.weights.dtype == np.float64, (
        f"{case}: the weights are {routing.weights.dtype}, expected float64"
    )
    assert np.array_equal(scores, kept), f"{case}: route changes the scores that it is given"
    return routing


def check_choices(student, scores, expected):
    got = np.asarray(routed(student, scores, len(scores) * 2).experts)
    for token, pair in enumerate(expected):
        assert got[token].tolist() == list(pair), (
            f"scores {scores[token].tolist()} ({scores.dtype}): the experts are "
            f"{got[token].tolist()}, expected {list(pair)}"
        )


def check_weights(student, scores, expected):
    got = np.asarray(routed(student, scores, len(scores) * 2).weights)
    for token, pair in enumerate(expected):
        assert np.allclose(got[token], pair, rtol=0, atol=1e-12), (
            f"scores {scores[token].tolist()} ({scores.dtype}): the weights are "
            f"{got[token].tolist()}, expected the softmax over the two chosen scores, {list(pair)}"
        )


def check_slots(student, scores, capacity):
    routing = routed(student, scores, capacity)
    experts, slots = np.asarray(routing.experts), np.asarray(routing.slots)
    for expert in range(scores.shape[1]):
        taken = sorted(slots[(experts == expert) & (slots >= 0)].tolist())
        wanted = sum(expert in best_two(row) for row in scores.tolist())
        assert taken == list(range(min(capacity, wanted))), (
            f"{named(scores, capacity)}: {wanted} choices fall on expert {expert}, and its slots "
            f"are {taken}, expected 0 to {min(capacity, wanted) - 1}, each once"
        )


def best_two(row):
    """The numbers of the two highest scores, the lower number first among equals."""
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:2]


def slots_one_by_one(scores, capacity):
    """[tokens, 2]: what each choice finds, when they come in the order of the docstring."""
    slots = np.full((len(scores), 2), -1)
    members = [[] for _ in range(scores.shape[1])]
    pairs = [best_two(row) for row in scores.tolist()]
    for choice in (0, 1):
        for token, pair in enumerate(pairs):
            if len(members[pair[choice]]) < capacity:
                slots[token, choice] = len(members[pair[choice]])
                members[pair[choice]].append(token)
    return slots


def drawn_scores(chance):
    """Logits of a few tokens; often with ties, over few experts or over many."""
    shape = int(chance.integers(0, 20)), int(chance.choice([2, 3, 5, 8, 40]))
    kind = chance.integers(4)
    if kind == 0:
        return chance.normal(size=shape)
    if kind == 1:
        return chance.normal(size=shape).astype(np.float32)
    if kind == 2:
        return chance.integers(-2, 3, shape)  # whole numbers, of an integer dtype: many ties
    return 500.0 * chance.integers(-2, 2, shape)


def drawn_capacity(chance):
    return int(chance.choice([0, 1, 2, 3, 5, 8, 40]))


def named(scores, capacity):
    return f"{scores.dtype} scores {np.round(scores, 2).tolist()}"[:400] + f", capacity {capacity}"
