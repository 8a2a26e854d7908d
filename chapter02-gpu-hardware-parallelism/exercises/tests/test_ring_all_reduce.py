"""Task 1: equal to a plain sum, for every number of workers, with not a byte too many."""

import numpy as np
from grader_network import Network, run_workers


def reduced(student, world_size, size, dtype=np.int64):
    """Each worker's buffer after the all-reduce, the true sum, and the network."""
    generator = np.random.default_rng(world_size * 1000 + size)
    buffers = [generator.integers(-1000, 1000, size).astype(dtype) for _ in range(world_size)]
    expected = np.sum(buffers, axis=0, dtype=dtype)
    network = Network(world_size)

    def work(rank):
        student.ring_all_reduce(
            buffers[rank], rank, world_size, network.sender(rank), network.receiver(rank)
        )

    run_workers(world_size, work)
    return buffers, expected, network


def assert_sums(student, world_size, size, dtype=np.int64):
    buffers, expected, network = reduced(student, world_size, size, dtype)
    for rank, buffer in enumerate(buffers):
        wrong = np.flatnonzero(buffer != expected)
        assert wrong.size == 0, (
            f"worker {rank} of {world_size}, {size} elements: {wrong.size} are not the sum; "
            f"element {wrong[0]} is {buffer[wrong[0]]}, the sum is {expected[wrong[0]]}"
        )
    return network


def test_every_worker_holds_the_sum(student):
    for world_size in (1, 2, 3, 4, 8):
        assert_sums(student, world_size, 24)
    assert_sums(student, 4, 24, np.float64)


def test_uneven_and_tiny_buffers(student):
    for world_size in (1, 2, 3, 5, 7):
        for size in (0, 1, 2, 10, 23):
            assert_sums(student, world_size, size)


def test_talks_to_its_neighbours_only(student):
    for world_size in (3, 6):
        network = assert_sums(student, world_size, 60)
        for source, to, _ in network.sent:
            assert to == (source + 1) % world_size, (
                f"worker {source} of {world_size} sent to worker {to}; its neighbour in the ring "
                f"is {(source + 1) % world_size}"
            )


def test_sends_no_byte_too_many(student):
    for world_size, size in ((2, 10), (4, 100), (5, 23), (8, 64)):
        network = assert_sums(student, world_size, size)
        sent = sum(elements for _, _, elements in network.sent)
        expected = 2 * (world_size - 1) * size
        assert sent == expected, (
            f"{world_size} workers, {size} elements: a ring sends 2 * (K - 1) * n = {expected} "
            f"elements in all, these sent {sent}"
        )
        largest = max(elements for _, _, elements in network.sent)
        assert largest <= -(-size // world_size), (
            f"{world_size} workers, {size} elements: one message has {largest}; a chunk has at "
            f"most {-(-size // world_size)}"
        )
