"""Task 1: equal to a plain sum, for every number of workers, with not a byte too many."""

from collections import Counter

from grader_network import Network, run_workers

# the largest whole number that a sum may reach, so that it is exact in every order
LARGEST = {"int64": 2**62, "int32": 2**30, "float64": 2**52, "float32": 2**23, "float16": 2**10}
RANDOM_CASES = 8


def test_every_worker_holds_the_sum(student, chance):
    for world_size in (1, 2, 3, 4, 8):
        assert_sums(student, chance, world_size, 24)
    for dtype in LARGEST:
        assert_sums(student, chance, int(chance.integers(2, 7)), 24, dtype)


def test_uneven_and_tiny_buffers(student, chance):
    for world_size in (1, 2, 3, 5, 7):
        for size in (0, 1, 2, 10, 23):
            assert_sums(student, chance, world_size, size)
    for _ in range(RANDOM_CASES):
        assert_sums(student, chance, *drawn_case(chance))


def test_talks_to_its_neighbours_only(student, chance):
    cases = [(3, 60, "int64"), (6, 60, "int64"), *(drawn_case(chance) for _ in range(RANDOM_CASES))]
    for world_size, size, dtype in cases:
        network = assert_sums(student, chance, world_size, size, dtype)
        for source, to, *_ in network.sent:
            assert to == (source + 1) % world_size, (
                f"worker {source} of {world_size} sent to worker {to}; its neighbour in the ring "
                f"is {(source + 1) % world_size}"
            )
        for source, to in network.waiting():
            raise AssertionError(
                f"{world_size} workers, {size} elements: a message from worker {source} was never "
                f"received by worker {to}"
            )


def test_sends_no_byte_too_many(student, chance):
    cases = [(2, 10), (4, 100), (5, 23), (8, 64), (1, 7)]
    cases = [(*case, "int64") for case in cases] + [(3, 12, "float16"), (4, 9, "float32")]
    cases += [drawn_case(chance) for _ in range(RANDOM_CASES)]
    for world_size, size, dtype in cases:
        network = assert_sums(student, chance, world_size, size, dtype)
        case = f"{world_size} workers, {size} elements of {dtype}"
        sent = Counter()
        for source, _, elements, _ in network.sent:
            sent[source] += elements
        expected = 2 * (world_size - 1) * size
        assert sum(sent.values()) == expected, (
            f"{case}: a ring sends 2 * (K - 1) * n = {expected} elements in all, these sent "
            f"{sum(sent.values())}"
        )
        smallest, largest = size // world_size, -(-size // world_size)
        for source, _, elements, wire in network.sent:
            assert smallest <= elements <= largest, (
                f"{case}: one message has {elements}; a chunk has at most {largest}, and at least "
                f"{smallest}"
            )
            assert wire == dtype, f"{case}: worker {source} sends {wire}"
        if world_size == 1:
            continue
        messages = Counter(source for source, *_ in network.sent)
        for rank in range(world_size):
            bounds = 2 * (size - largest), 2 * (size - smallest)
            assert bounds[0] <= sent[rank] <= bounds[1] and messages[rank] <= 2 * (
                world_size - 1
            ), (
                f"{case}: worker {rank} sends {sent[rank]} elements in {messages[rank]} messages; "
                f"in a ring each sends all chunks but one, twice: {bounds[0]} to {bounds[1]} "
                f"elements in {2 * (world_size - 1)} messages"
            )


def drawn_case(chance):
    """(world_size, size, dtype)."""
    world_size = int(chance.integers(1, 9))
    size = int(chance.choice([0, 1, world_size - 1, world_size + 1, 13, 48, 97]))
    return world_size, size, str(chance.choice(list(LARGEST)))


def assert_sums(student, chance, world_size, size, dtype="int64"):
    """All workers' buffers hold the true sums after each of two all-reduces in a row.

    Returns the network of the first, whose messages are counted.
    """
    largest = LARGEST[dtype] // (world_size + 1)
    networks = Network(world_size), Network(world_size)
    rounds = [
        [chance.integers(-largest, largest + 1, size).astype(dtype) for _ in range(world_size)]
        for _ in networks
    ]
    results = [[buffer.copy() for buffer in buffers] for buffers in rounds]

    def work(rank):
        for buffers, network in zip(results, networks, strict=True):
            send, receive = network.sender(rank), network.receiver(rank)
            student.ring_all_reduce(buffers[rank], rank, world_size, send, receive)

    run_workers(world_size, work)
    for before, after in zip(rounds, results, strict=True):
        expected = [sum(int(buffer[i]) for buffer in before) for i in range(size)]
        for rank, buffer in enumerate(after):
            wrong = [i for i in range(size) if buffer[i] != expected[i]]
            assert not wrong, (
                f"worker {rank} of {world_size}, {size} elements of {dtype}: {len(wrong)} are not "
                f"the sum; element {wrong[0]} is {buffer[wrong[0]]}, the sum of "
                f"{[int(b[wrong[0]]) for b in before]} is {expected[wrong[0]]}"
            )
    return networks[0]
