"""Task 5: token by token in plain Python and float64, gradients by their formulas."""

import math
from fractions import Fraction

import numpy as np
import torch
from grader_router import lost, routed

DTYPES = (torch.float32, torch.bfloat16)
INF = math.inf


def random_logits(chance, dtype=None):
    """Of few values, so that many are equal, or of many; some -inf."""
    tokens, experts = int(chance.choice([0, 1, 3, 12, 40])), int(chance.integers(1, 7))
    values = chance.normal(size=(tokens, experts)) * chance.choice([0.3, 1, 5])
    if chance.random() < 0.4:
        values = np.round(values)
    if chance.random() < 0.3:
        values[chance.random(values.shape) < 0.2] = -INF
        values[np.isinf(values).all(1)] = 0.0
    if chance.random() < 0.5:
        values[:, int(chance.integers(experts))] += 1  # so that one expert is full first
    dtype = dtype or DTYPES[int(chance.integers(2))]
    return torch.tensor(values).to(dtype)


def random_factor(chance):
    return float(chance.choice([0, 0.125, 0.5, 0.875, 1, 1, 1.25, 1.5, 2, 8]))


def room(tokens, experts, factor):
    return math.ceil(tokens * Fraction(factor) / experts)


def by_tokens(logits, factor):
    """(experts, places): each token in its turn."""
    left = [0] * logits.shape[1]
    experts, places = [], []
    for row in logits.double().tolist():
        expert = row.index(max(row))
        free = left[expert] < room(*logits.shape, factor)
        experts.append(expert)
        places.append(left[expert] if free else -1)
        left[expert] += 1
    return experts, places


def softmax(logits):
    exps = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)


def told(logits, factor=None):
    shape = f"{logits.shape[0]} tokens, {logits.shape[1]} experts, {str(logits.dtype)[6:]}"
    factor = "" if factor is None else f", factor {factor}"
    return f"{shape}{factor}, logits {logits.tolist()!r:.150}"


def assert_routed(student, logits, factor, why=""):
    """The gates and their gradient, after experts and places are what they must be."""
    upstream = torch.linspace(1, 2, len(logits))
    handed = logits.clone()
    expert, place, gate, gradient, changed = routed(student.route, handed, factor, upstream)
    case = f"{told(logits, factor)}{': ' if why else ''}{why}"
    experts, places = by_tokens(logits, factor)
    for what, got, expected in (("expert", expert, experts), ("place", place, places)):
        assert got.dtype == torch.int64, f"{case}: {what} is {got.dtype}, not int64"
        assert got.tolist() == expected, f"{case}: expected {what}s {expected}, got {got.tolist()}"
    assert not changed, f"{case}: route changed the logits"
    return case, experts, np.array(places) >= 0, upstream.numpy(), gate, gradient


def test_the_expert_and_the_place(student, chance):
    for rows, why in (
        ([[1, 2], [2, 1], [0, 3]], "experts 1, 0, 1"),
        ([[1, 1, 1], [0, 2, 2], [3, 0, 3]], "the lowest of equals"),
        ([[-INF, -1.0], [-INF, 5.0]], "never an expert of -inf"),
        ([[0.0, 1e-12], [0.0, 1e-30]], "not equal, though their softmax is"),
        ([[-3.0], [4.0]], "one expert"),
    ):
        assert_routed(student, torch.tensor(rows, dtype=torch.float32), 8.0, why)
    for _ in range(50):
        logits = random_logits(chance)
        assert_routed(student, logits, 8.0 * logits.shape[1])
    near = torch.zeros(20, 5)  # differences that a softmax in float32 rounds away
    near[range(20), chance.integers(0, 5, 20)] = 1e-9
    assert_routed(student, near, 8.0, "the highest logit, by little")


def test_capacity_and_who_is_dropped(student, chance):
    for tokens, experts, factor, expected in (
        (12, 4, 1.0, 3), (12, 4, 1.25, 4), (12, 4, 0.5, 2), (13, 4, 1.0, 4), (12, 5, 1.0, 3),
        (12, 4, 0.0, 0), (0, 4, 1.0, 0), (1, 64, 1.0, 1), (1, 1, 8.0, 8), (3, 4, 0.125, 1),
        (7, 2, 2.0, 7), (22, 3, 1.5, 11), (84, 7, 2.25, 27), (72, 7, 2.625, 27),
        (32769, 4096, 0.125, 2), (8 * 10**6 + 1, 10**6, 0.125, 2),
    ):  # fmt: skip
        assert_capacity(student, tokens, experts, factor, expected)
    for _ in range(200):
        tokens, experts = chance.integers(1, 200, 2).tolist()
        factor = int(chance.integers(0, 25)) / 8
        assert_capacity(student, tokens, experts, factor, room(tokens, experts, factor))
    crowd = torch.tensor([[1.0, 0.0]] * 4 + [[5.0, 0.0], [0.0, 1.0]])
    assert_routed(student, crowd, 1.0, "first come, first kept, however sure the fifth is")
    assert_routed(student, crowd, 0.0, "no room for anybody")
    for dtype in DTYPES:  # more than an int8 counts, or a bfloat16 exactly
        many = torch.tensor(chance.normal(size=(700, 2)) + [3, 0]).to(dtype)
        assert_routed(student, many, 1.0, "700 tokens")
    for _ in range(60):
        assert_routed(student, random_logits(chance), random_factor(chance))


def assert_capacity(student, tokens, experts, factor, expected):
    got = student.capacity(tokens, experts, factor)
    assert got == expected and type(got) is int, (
        f"{tokens} tokens, {experts} experts, factor {factor}: expected room for {expected}, got "
        f"{got!r}"
    )


def test_gates_and_their_gradient(student, chance):
    for number in range(60):
        logits = random_logits(chance, DTYPES[number % 2])
        if number % 3 == 0:  # large ones
            logits = logits * 40
        found = assert_routed(student, logits, random_factor(chance))
        case, experts, kept, upstream, gate, gradient = found
        p = softmax(logits)
        own = p[range(len(p)), experts] * kept
        assert_near("the gates", gate, own, torch.float32, case)
        if gradient is None:
            assert not kept.any(), f"{case}: no gradient flows through the gates"
            continue
        expected = (upstream * own)[:, None] * (np.eye(p.shape[1])[experts] - p)
        assert_near("the gradient of the gates", gradient, expected, logits.dtype, case)


def test_the_balancing_loss(student, chance):
    even = torch.eye(4).repeat(2, 1) * 30
    for logits, expected, why in (
        (even, 1.0, "every expert has two tokens"),
        (torch.eye(4)[[0] * 8] * 30, 4.0, "all tokens at one of four experts"),
        (torch.zeros(5, 3), 1.0, "all at the first, by a tie, though p is even"),
        (torch.zeros(0, 3), 0.0, "no tokens"),
        (torch.zeros(701, 3).bfloat16(), 1.0, "701 tokens, which bfloat16 rounds to 700"),
        (torch.zeros(6, 1), 1.0, "one expert"),
    ):
        loss, *_ = lost(student.balancing_loss, logits)
        case = f"{told(logits)}: {why}"
        assert (loss.shape, loss.dtype) == ((), torch.float32), (
            f"{case}: the loss is {tuple(loss.shape)} {loss.dtype}"
        )
        assert_near("the loss", loss, np.array(expected), torch.float32, case)
    for number in range(60):
        logits = random_logits(chance, DTYPES[number % 2])
        if number % 3 == 0:  # large ones: their exponentials are no float32
            logits = logits * 40
        elif number % 3 == 1:  # nearly equal: a softmax in float32 makes them so
            logits = logits.sign().nan_to_num(0.0) * 1e-9
        loss, gradient, changed = lost(student.balancing_loss, logits.clone())
        case, (tokens, experts) = told(logits), logits.shape
        assert not changed, f"{case}: balancing_loss changed the logits"
        p, counts = softmax(logits), np.bincount(by_tokens(logits, 1.0)[0], minlength=experts)
        f = counts / max(1, tokens)
        expected = experts * (f * p.sum(0) / max(1, tokens)).sum()
        assert_near("the loss", loss, np.array(expected), torch.float32, case)
        if tokens == 0:
            continue
        assert gradient is not None, f"{case}: no gradient flows through p"
        flow = experts / tokens * p * (f - (p * f).sum(1, keepdims=True))
        assert_near("the gradient of the loss", gradient, flow, logits.dtype, case)


def assert_near(what, got, expected, dtype, case):
    """Within float32's rounding, and within bfloat16's of what is rounded to it at the end."""
    assert got.dtype == dtype, f"{case}: {what} is {got.dtype}, not {dtype}"
    assert got.shape == expected.shape, f"{case}: {what} has the shape {tuple(got.shape)}"
    relative = 1e-4 if dtype == torch.float32 else 1e-2
    near = np.isclose(got.double().numpy(), expected, rtol=relative, atol=2e-6)
    assert near.all(), (
        f"{case}: expected {what} {expected.round(5).tolist()!r:.200}, got "
        f"{np.round(got.double().numpy(), 5).tolist()!r:.200}"
    )
