"""Task 1: ranks that each have a part train as one process that has everything."""

import math

import torch
from grader_ranks import MOMENTS, Optimizer, train

WIDE, NARROW = torch.float32, torch.bfloat16


class Case:
    """Weights, gradients of some steps by rank, and an optimizer; with what the ranks made of it.

    The signs of an element's gradients are all ranks' own, so that no mean comes from cancellation.
    """

    def __init__(self, student, chance, n, ranks, dtype=WIDE, kind=None, steps=3, weigh=False):
        kind = kind or str(chance.choice(list(MOMENTS)))
        self.n, self.ranks, self.dtype = n, ranks, dtype
        self.size = math.ceil(n / ranks)
        self.options = kind, float(chance.uniform(0.02, 0.2)), float(chance.choice([0, 0.3]))
        self.weights = torch.tensor(chance.normal(size=n)).to(dtype)
        self.gradients = []
        for _ in range(steps):
            signs = chance.choice([-1, 1], n)
            numbers = chance.integers(1, 256, (ranks, n)) * signs / 256
            self.gradients.append(list(torch.tensor(numbers).to(dtype)))
        needs_gradient = bool(chance.random() < 0.5)
        self.results, self.grown = train(
            student.sharded_optimizer, self.options, self.weights.clone(),
            [[one.clone() for one in step] for step in self.gradients],
            ranks, needs_gradient, weigh,
        )  # fmt: skip

    def __str__(self):
        return f"{self.n} weights in {str(self.dtype)[6:]} on {self.ranks} ranks, {self.options[0]}"

    def expected(self):
        """After each step: one process's float32 weights."""
        whole = self.weights.float()
        optimizer = Optimizer([whole], *self.options)
        for step in self.gradients:
            whole.grad = sum(one.float() for one in step) / self.ranks
            optimizer.step()
            yield whole.clone()

    def assert_honest(self):
        for rank, (_, _, faults, _, _) in enumerate(self.results):
            assert not faults, f"{self}, rank {rank}: {', '.join(sorted(faults))}"
        one_step = [
            ("reduce_scatter", (self.ranks * self.size,), "torch.float32"),
            ("all_gather", (self.size,), str(self.dtype)),
        ]
        for rank, (*_, calls) in enumerate(self.results):
            steps = len(self.gradients)
            assert calls == steps * one_step, (
                f"{self}, rank {rank}: {steps} steps are so often {one_step}; it called {calls}"
            )

    def part_of(self, rank, whole):
        return whole[rank * self.size : (rank + 1) * self.size]


def assert_close(case, what, got, expected):
    got = torch.tensor(got)
    assert got.shape == expected.shape, f"{case}: {what} has the shape {tuple(got.shape)}"
    near = torch.isclose(got, expected, rtol=1e-5, atol=1e-6)
    assert near.all(), (
        f"{case}: {what} is {got.tolist()!r:.200}, expected {expected.tolist()!r:.200}"
    )


def sizes_of(chance):
    """Numbers of weights and ranks: some divide, and some leave ranks with padding only."""
    usual = [(8, 4), (10, 4), (9, 3), (7, 2), (5, 1), (1, 3), (3, 4), (2, 2)]
    return [*usual, *((int(chance.integers(1, 50)), int(chance.integers(1, 5))) for _ in range(8))]


def test_what_a_rank_hands_its_optimizer(student, chance):
    for number, (n, ranks) in enumerate(sizes_of(chance)):
        case = Case(student, chance, n, ranks, (WIDE, NARROW)[number % 2], steps=0)
        case.assert_honest()
        padded = torch.zeros(ranks * case.size)
        padded[:n] = case.weights
        for rank, (_, _, _, made, _) in enumerate(case.results):
            where = f"{case}, rank {rank}"
            assert len(made) == 1, f"{where}: make_optimizer was called {len(made)} times"
            assert len(made[0]) == 1, f"{where}: an optimizer of {len(made[0])} tensors"
            [part], expected = made[0], case.part_of(rank, padded)
            assert (part.shape, part.dtype) == (expected.shape, WIDE), (
                f"{where}: the optimizer's tensor is {tuple(part.shape)} {part.dtype}, expected "
                f"{tuple(expected.shape)} torch.float32"
            )
            assert part.equal(expected), f"{where}: {part.tolist()} is not {expected.tolist()}"
    weights = torch.ones(6)
    for why, *arguments in (
        ("rank 2 of 2", weights, 2, 2), ("rank -1 of 2", weights, -1, 2),
        ("rank 0 of 0", weights, 0, 0), ("two dimensions", weights.view(2, 3), 0, 2),
        ("no dimension", torch.tensor(1.0), 0, 1),
    ):  # fmt: skip
        try:
            student.sharded_optimizer(*arguments, no_optimizer)
        except ValueError:
            continue
        raise AssertionError(f"{why}: expected a ValueError")


def no_optimizer(tensors):
    raise AssertionError("an optimizer is made before the arguments are looked at")


def test_trains_as_one_process_does(student, chance):
    for n, ranks in sizes_of(chance):
        for kind in MOMENTS:
            case = Case(student, chance, n, ranks, kind=kind)
            for step, whole in enumerate(case.expected()):
                for rank, (weights, *_) in enumerate(case.results):
                    what = f"after step {step}, rank {rank}'s copy of the weights"
                    assert_close(case, what, weights[step], whole)
            case.assert_honest()


def test_keeps_and_sends_no_more_than_its_part(student, chance):
    for kind, dtype in zip(MOMENTS, (WIDE, WIDE, NARROW), strict=True):
        n, ranks = int(chance.integers(2000, 4000)), int(chance.integers(2, 5))
        case = Case(student, chance, n, ranks, dtype, kind, steps=2, weigh=True)
        case.assert_honest()
        one_step = [
            ("reduce_scatter", (ranks * case.size,), "torch.float32"),
            ("all_gather", (case.size,), str(dtype)),
        ]
        for rank, (*_, calls) in enumerate(case.results):
            assert calls == 2 * one_step, (
                f"{case}, rank {rank}: two steps are twice {one_step}; it called {calls}"
            )
        most = ranks * case.size * 4 * (1 + MOMENTS[kind])
        assert case.grown <= most + 1000, (
            f"{case}: after a step all ranks together keep {case.grown} bytes more than the weights"
            f" and gradients; the parts and their state are {most}"
        )


def test_mixed_precision_keeps_what_rounding_loses(student, chance):
    for n, ranks in sizes_of(chance):
        case = Case(student, chance, n, ranks, NARROW, steps=4)
        for step, whole in enumerate(case.expected()):
            own = []
            for rank, (_, parts, *_) in enumerate(case.results):
                [part] = parts[step]
                expected = case.part_of(rank, whole)
                what = f"after step {step}, rank {rank}'s part"
                assert_close(case, what, part[: len(expected)], expected)
                own += part[: len(expected)]
            rounded = torch.tensor(own).to(NARROW).float()
            for rank, (weights, *_) in enumerate(case.results):
                assert torch.tensor(weights[step]).equal(rounded), (
                    f"{case}: after step {step}, rank {rank}'s weights are not the parts, rounded"
                )
        case.assert_honest()
