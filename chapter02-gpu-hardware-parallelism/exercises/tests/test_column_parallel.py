"""Task 2: the workers together compute what one worker computes."""

import threading

import numpy as np
import pytest
from grader_network import run_workers

HIDDEN, INNER, TOKENS = 6, 12, 5
WORLD_SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-12  # float64; only the order of the sums differs


class Meeting:
    """An all-reduce between threads, which counts how often it was called."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size, timeout=10)
        self.parts, self.calls = {}, [0] * world_size

    def all_reduce_of(self, rank):
        def all_reduce(array):
            self.calls[rank] += 1
            self.parts[rank] = np.array(array)
            self.barrier.wait()
            total = sum(self.parts.values())
            self.barrier.wait()
            return total

        return all_reduce


def problem():
    generator = np.random.default_rng(7)
    x = generator.normal(size=(TOKENS, HIDDEN))
    up, down = generator.normal(size=(HIDDEN, INNER)), generator.normal(size=(INNER, HIDDEN))
    grad_y = generator.normal(size=(TOKENS, HIDDEN))
    return x, up, down, grad_y


def alone(x, up, down, grad_y):
    inner = np.maximum(x @ up, 0)
    grad_inner = (grad_y @ down.T) * (inner > 0)
    return inner @ down, grad_inner @ up.T, x.T @ grad_inner, inner.T @ grad_y


def together(student, world_size):
    """Per worker: y, dx, the shards of dup and ddown, and its all-reduces (forward, backward)."""
    x, up, down, grad_y = problem()
    meeting = Meeting(world_size)

    def work(rank):
        up_shard = np.split(up, world_size, axis=1)[rank]
        down_shard = np.split(down, world_size, axis=0)[rank]
        mlp = student.make_parallel_mlp(up_shard, down_shard, meeting.all_reduce_of(rank))
        y = mlp.forward(x)
        forward_calls = meeting.calls[rank]
        grad_x, grad_up, grad_down = mlp.backward(grad_y)
        return y, grad_x, grad_up, grad_down, (forward_calls, meeting.calls[rank] - forward_calls)

    return run_workers(world_size, work)


def assert_close(name, rank, world_size, got, expected):
    assert np.shape(got) == expected.shape, (
        f"{name} on worker {rank} of {world_size} has the shape {np.shape(got)}, "
        f"expected {expected.shape}"
    )
    worst = np.abs(got - expected).max()
    assert worst <= TOLERANCE * max(1, np.abs(expected).max()), (
        f"{name} on worker {rank} of {world_size} differs from one worker's by {worst:.2g}"
    )


def test_shards_make_up_the_weight(student):
    _, up, down, _ = problem()
    for world_size in WORLD_SIZES:
        shards = [student.split_weights(up, down, rank, world_size) for rank in range(world_size)]
        for rank, (up_shard, down_shard) in enumerate(shards):
            expected = ((HIDDEN, INNER // world_size), (INNER // world_size, HIDDEN))
            got = (np.shape(up_shard), np.shape(down_shard))
            assert got == expected, (
                f"worker {rank} of {world_size}: shards of shapes {got}, expected {expected}"
            )
        np.testing.assert_array_equal(np.concatenate([s[0] for s in shards], axis=1), up)
        np.testing.assert_array_equal(np.concatenate([s[1] for s in shards], axis=0), down)
    with pytest.raises(ValueError, match=r"(?s)(5.*12|12.*5)"):
        student.split_weights(up, down, 0, 5)


def test_forward_equals_one_worker(student):
    expected = alone(*problem())[0]
    for world_size in WORLD_SIZES:
        for rank, (y, *_) in enumerate(together(student, world_size)):
            assert_close("y", rank, world_size, y, expected)


def test_gradients_equal_one_worker(student):
    _, grad_x, grad_up, grad_down = alone(*problem())
    for world_size in WORLD_SIZES:
        for rank, (_, dx, dup, ddown, _) in enumerate(together(student, world_size)):
            assert_close("dL/dx", rank, world_size, dx, grad_x)
            shard = np.split(grad_up, world_size, axis=1)[rank]
            assert_close("dL/dup", rank, world_size, dup, shard)
            shard = np.split(grad_down, world_size, axis=0)[rank]
            assert_close("dL/ddown", rank, world_size, ddown, shard)


def test_one_all_reduce_each_way(student):
    for rank, (*_, calls) in enumerate(together(student, 4)):
        assert calls == (1, 1), (
            f"worker {rank} of 4 called all_reduce {calls[0]} times forward and {calls[1]} times "
            "backward; once each is enough"
        )
