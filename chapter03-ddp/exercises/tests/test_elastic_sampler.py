"""Task 5: jobs of several ranks that grow and shrink, step by step."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from grader_elsewhere import told_elsewhere

WORLD_SIZES = (1, 2, 3, 5, 8)


class Job:
    """The samplers of all ranks, and how many examples a step has in each world."""

    def __init__(self, student, examples, batch, world_size, seed, state=None):
        self.student, self.examples, self.batch, self.seed = student, examples, batch, seed
        self.world_size = world_size
        self.samplers = [
            student.make_sampler(examples, batch, rank, world_size, seed)
            for rank in range(world_size)
        ]
        for sampler in self.samplers if state is not None else ():
            sampler.load_state_dict(json.loads(state))

    def __str__(self):
        return (
            f"{self.examples} examples (seed {self.seed}) on {self.world_size} ranks with batches "
            f"of {self.batch}"
        )

    def step(self, order=None):
        """The batches of one step, by rank; the ranks are asked in the order `order`."""
        batches = {}
        for rank in order or range(self.world_size):
            batches[rank] = self.samplers[rank].next_batch()
            wrong = [one for one in batches[rank] if type(one) is not int]
            assert isinstance(batches[rank], list) and not wrong, (
                f"{self}: a batch is a list of ints of Python, got {batches[rank]!r:.80}"
            )
        return [batches[rank] for rank in range(self.world_size)]

    def steps_of_an_epoch(self):
        return math.ceil(self.examples / (self.world_size * self.batch))

    def epoch(self):
        return [self.step() for _ in range(self.steps_of_an_epoch())]

    def state(self):
        """As a checkpoint keeps it."""
        states = [json.dumps(sampler.state_dict(), sort_keys=True) for sampler in self.samplers]
        assert len(set(states)) == 1, f"{self}: the ranks' states differ: {sorted(set(states))[:2]}"
        assert len(states[0]) < 200, f"{self}: the state has {len(states[0])} characters"
        return states[0]

    def resumed(self, world_size):
        return Job(self.student, self.examples, self.batch, world_size, self.seed, self.state())


@pytest.fixture
def sizes(chance):
    """(examples, batch) at random: primes, whole steps, fewer than there are ranks."""
    kinds = [(103, 4), (1, 3), (2, 1), (64, 4), (7, 16), (240, 5)]
    kinds += [(int(chance.integers(1, 200)), int(chance.integers(1, 10))) for _ in range(6)]
    return [kinds[number] for number in chance.permutation(len(kinds))]


@pytest.fixture
def seed(chance):
    return int(chance.integers(1, 10**6))


def flat(steps):
    return [example for batches in steps for batch in batches for example in batch]


def assert_whole(taken, examples, case):
    counts = Counter(taken)
    missing = sorted(set(range(examples)) - set(counts))
    assert not missing, f"{case}: {missing[:5]} were left out"
    twice = sorted(example for example, count in counts.items() if count > 1)
    assert not twice, f"{case}: {twice[:5]} were taken more than once"
    assert len(taken) == examples, f"{case}: examples that do not exist were taken"


def test_an_epoch_is_every_example_once(student, sizes, seed, chance):
    for examples, batch in sizes:
        for world_size in map(int, chance.choice(WORLD_SIZES, 2, replace=False)):
            job = Job(student, examples, batch, world_size, seed)
            for number in range(3):
                assert_whole(flat(job.epoch()), examples, f"epoch {number} of {job}")
    first = orders(student, 103, 4, seed, world_size=1)
    assert len(set(map(tuple, first))) == len(first), "epoch 1 has the order of epoch 0, or 2 of 1"
    assert first == orders(student, 103, 4, seed, 1), "the same seed gives two orders"
    others = [orders(student, 103, 4, seed + more, 1) for more in (1, 2)]
    assert first[0] != others[0][0], "two seeds give the same order"
    # seed + epoch as the one seed of an order would be another seed's order in another epoch
    seen = Counter(tuple(order) for one in [first, *others] for order in one)
    assert max(seen.values()) == 1, "an epoch has the order of another epoch of another seed"
    assert_mixed(first[0])
    assert_unrelated(first)
    assert_far_seeds_differ(student, seed)
    for worlds in ((1, 8), (2, 3), (5, 1)):
        shared = 4 * math.lcm(*worlds)
        sets = [set(orders(student, 103, 4, seed, world)[0][:shared]) for world in worlds]
        assert sets[0] == sets[1], (
            f"the first {shared} examples of an epoch are not the same set on {worlds[0]} ranks "
            f"and on {worlds[1]}"
        )
    call = f"[adapters.make_sampler(50, 9, rank, 2, {seed}).next_batch() for rank in range(2)]"
    told, here = told_elsewhere(student.make_sampler, call), Job(student, 50, 9, 2, seed).step()
    assert told == repr(here), (
        f"each rank is a process of its own: the batches of 50 examples on 2 ranks are {here} here "
        f"and {told[:200]} in another Python"
    )


def orders(student, examples, batch, seed, world_size):
    """The examples of three epochs, step by step."""
    job = Job(student, examples, batch, world_size, seed)
    return [flat(job.epoch()) for _ in range(3)]


def assert_mixed(order):
    """A permutation of 103 leaves one example in its place, give or take; 10 by no chance."""
    unmoved = sum(example == place for place, example in enumerate(order))
    rising = sum(b == a + 1 for a, b in zip(order, order[1:], strict=False))
    assert unmoved < 10 and rising < 10, (
        f"{unmoved} of {len(order)} examples are in their own place and {rising} follow the one "
        "before them: this is no random order"
    )


def assert_unrelated(orders):
    """Two random orders share 2 neighbours on average, and differ by each number about once."""
    first, examples = np.array(orders[0]), len(orders[0])
    pairs = [
        {frozenset(pair) for pair in zip(order, order[1:] + order[:1], strict=True)}
        for order in orders
    ]
    for epoch in range(1, len(orders)):
        kept = len(pairs[0] & pairs[epoch])
        apart = int(np.bincount((np.array(orders[epoch]) - first) % examples).max())
        assert kept < 20 and apart < 20, (
            f"epoch {epoch} has {kept} of {examples} neighbours in common with epoch 0, and "
            f"{apart} examples differ from epoch 0's by the same number: draw a new order each time"
        )


def assert_far_seeds_differ(student, seed):
    """Over 1,050 epochs, which is more than most train for."""

    def epochs(seed, count):
        sampler = student.make_sampler(40, 40, 0, 1, seed)
        return [tuple(sampler.next_batch()) for _ in range(count)]

    known = {order: epoch for epoch, order in enumerate(epochs(seed, 1050))}
    for apart in (1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6, 2**16, 2**20):
        for epoch, order in enumerate(epochs(seed + apart, 50)):
            assert order not in known, (
                f"epoch {known[order]} of seed {seed} has the order of epoch {epoch} of seed "
                f"{seed + apart}: two seeds, near or far, share no order"
            )


def test_the_world_may_change_at_any_step(student, sizes, seed, chance):
    for examples, batch in sizes:
        job = Job(student, examples, batch, int(chance.choice(WORLD_SIZES)), seed)
        worlds, taken, epochs = [job.world_size], [], 0
        order = flat(Job(student, examples, batch, 1, seed).epoch())
        while epochs < 3:
            case = f"{examples} examples in batches of {batch}, worlds of {worlds} ranks"
            batches = job.step()
            assert any(batches), f"{case}: no rank gets an example, and {len(taken)} were taken"
            wanted = min(len(taken) + job.world_size * batch, examples)
            taken += flat([batches])
            if not epochs:
                assert set(taken) == set(order[:wanted]), (
                    f"{case}: the first {wanted} examples of the epoch are to be taken by now, as "
                    "on one rank, and they are not"
                )
            if len(taken) >= examples:
                assert_whole(taken, examples, case)
                taken, epochs = [], epochs + 1
            if chance.random() < 0.4:
                job = job.resumed(int(chance.choice(WORLD_SIZES)))
                worlds.append(job.world_size)


def test_the_short_end_is_shared_evenly(student, sizes, seed):
    for world_size in WORLD_SIZES:
        for examples, batch in sizes:
            job = Job(student, examples, batch, world_size, seed)
            for number, batches in enumerate(job.epoch()):
                lengths = [len(one) for one in batches]
                left = min(world_size * batch, examples - number * world_size * batch)
                case = f"step {number} of {job}"
                assert sum(lengths) == left, f"{case}: {sum(lengths)} examples taken, {left} next"
                assert max(lengths) - min(lengths) <= 1, f"{case}: the batches have {lengths}"


def test_a_state_resumes_exactly(student, sizes, seed, chance):
    for world_size in (1, 3, 4):
        for examples, batch in sizes[:4]:
            job = Job(student, examples, batch, world_size, seed)
            resumed, begin = None, job.state()
            first = job.resumed(world_size).step()
            for number in range(2 * job.steps_of_an_epoch() + 2):
                assert job.state() == job.state(), f"{job}: two looks give two states"
                fresh = job.resumed(world_size)
                if resumed is None or chance.random() < 0.3:
                    resumed = job.resumed(world_size)
                if chance.random() < 0.3:  # a sampler that has run, set back or forth
                    for sampler in resumed.samplers:
                        sampler.load_state_dict(json.loads(job.state()))
                order = chance.permutation(world_size).tolist()
                unbroken, broken, long_ago = job.step(), fresh.step(order), resumed.step()
                case = f"{job}, resumed after {number} steps or before"
                assert broken == unbroken == long_ago, (
                    f"{case}: the next batches are {broken} and {long_ago}, without the break they "
                    f"were {unbroken}"
                )
                unbroken[0].append(-1)  # what the caller does to a batch is no sampler's business
            for sampler in job.samplers:  # far back
                sampler.load_state_dict(json.loads(begin))
            assert job.step() == first, f"{job}: set back to its begin, it goes on otherwise"
    job = Job(student, 10, 2, 1, seed)
    state = job.samplers[0].state_dict()
    kept = json.dumps(state, sort_keys=True)
    job.step()
    assert json.dumps(state, sort_keys=True) == kept, "a step changed a state that was told before"
