"""Task 5: small routings by hand, larger ones by their rules."""

import numpy as np


def random_scores(tokens=40, experts=6):
    return np.random.default_rng(11).normal(size=(tokens, experts))


def test_two_different_experts_and_their_weights(student):
    scores = np.array([[0.0, 2.0, 1.0], [5.0, 5.0, 5.0], [1000.0, 999.0, -1000.0]])
    routing = student.route(scores, 10)
    expected = [[1, 2], [0, 1], [0, 1]]
    assert np.array_equal(routing.experts, expected), (
        f"scores {scores.tolist()}: the experts are {np.asarray(routing.experts).tolist()}, "
        f"expected {expected}"
    )
    high = 1 / (1 + np.exp(-1.0))
    weights = np.array([[high, 1 - high], [0.5, 0.5], [high, 1 - high]])
    assert np.allclose(routing.weights, weights, rtol=0, atol=1e-12), (
        f"the weights are {np.asarray(routing.weights).tolist()}, expected the softmax over the "
        f"two chosen scores, {weights.tolist()}"
    )


def test_no_expert_is_over_its_capacity(student):
    for capacity in (0, 1, 5, 13, 100):
        routing = student.route(random_scores(), capacity)
        experts, slots = np.asarray(routing.experts), np.asarray(routing.slots)
        for expert in range(6):
            taken = sorted(slots[(experts == expert) & (slots >= 0)].tolist())
            wanted = int((experts == expert).sum())
            assert taken == list(range(min(capacity, wanted))), (
                f"capacity {capacity}: {wanted} choices fall on expert {expert}, and its slots are "
                f"{taken}, expected 0 to {min(capacity, wanted) - 1}, each once"
            )


def test_first_choices_come_first(student):
    # All want expert 0; the first two tokens only as their second choice.
    scores = np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    routing = student.route(scores, 2)
    expected = [[0, -1], [0, -1], [0, 1], [1, 1]]
    assert np.array_equal(routing.slots, expected), (
        f"tokens 2 and 3 have expert 0 as their first choice and come before 0 and 1: the slots "
        f"are {np.asarray(routing.slots).tolist()}, expected {expected}"
    )


def test_dropped_tokens_are_counted(student):
    for capacity in (0, 3, 9, 100):
        routing = student.route(random_scores(), capacity)
        slots, weights = np.asarray(routing.slots), np.asarray(routing.weights)
        missing = int((slots < 0).sum())
        assert routing.dropped == missing, (
            f"capacity {capacity}: {missing} choices have no slot, dropped says {routing.dropped}"
        )
        assert not weights[slots < 0].any(), f"capacity {capacity}: a dropped choice has a weight"
        both = (slots >= 0).all(axis=1)
        assert np.allclose(weights[both].sum(axis=1), 1), "weights of kept choices do not sum to 1"
        one = (slots >= 0).sum(axis=1) == 1
        assert (weights[one].sum(axis=1) < 1).all(), (
            f"capacity {capacity}: the weight of a token's other choice was scaled up"
        )
