"""Task 3: disjoint over ranks, the same run at every world size, and exact after a restart."""

import json
import random

import numpy as np
from grader_global_state import batches_and_next_draws, batches_elsewhere, batches_of

EXAMPLES, GLOBAL_BATCH, SEED = 103, 12, 7
STEPS_PER_EPOCH = EXAMPLES // GLOBAL_BATCH
LARGEST_STATE = 1000  # characters of JSON: constant, however many examples and steps
RANDOM_RUNS = 6


def test_ranks_are_disjoint_and_cover_the_epoch(student, chance):
    check_epochs(student, (EXAMPLES, GLOBAL_BATCH, SEED), world_size=3, epochs=2)
    check_epochs(student, (GLOBAL_BATCH, GLOBAL_BATCH, SEED), world_size=3, epochs=3)
    for _ in range(RANDOM_RUNS):
        run = drawn_run(chance)
        check_epochs(student, run, drawn_world_size(chance, run[1]), epochs=3)
    check_every_example_is_read(student, chance)
    check_order_is_shuffled(student, chance)
    check_private_randomness(student, chance)


def test_global_batch_is_the_same_for_every_world_size(student, chance):
    for run in [(EXAMPLES, GLOBAL_BATCH, SEED), drawn_run(chance), drawn_run(chance)]:
        examples, global_batch, seed = run
        steps = examples // global_batch + 3
        alone = global_batches(student, run, 1, steps)
        for world_size in divisors(global_batch):
            together = global_batches(student, run, world_size, steps)
            for step, (got, expected) in enumerate(zip(together, alone, strict=True)):
                assert got == expected, (
                    f"{named(run)}, step {step}: {world_size} ranks together read {got}, one rank "
                    f"reads {expected}"
                )
    check_refused(student, (103, 12, 0, 5), 5, 12)
    check_refused(student, (11, 12, 0, 4), 11, 12)
    global_batch = 2 * int(chance.integers(10, 50))
    check_refused(
        student, (1000, global_batch, 0, global_batch - 1), global_batch, global_batch - 1
    )


def test_resumes_at_another_world_size(student, chance):
    for before, after in ((2, 2), (4, 1), (1, 3), (3, 4)):
        check_resume(student, (EXAMPLES, GLOBAL_BATCH, SEED), before, after, steps=5)
    for _ in range(RANDOM_RUNS):
        run = drawn_run(chance)
        worlds = [drawn_world_size(chance, run[1]) for _ in range(2)]
        check_resume(student, run, *worlds, steps=int(chance.integers(run[0] // run[1] + 1)))


def test_resumes_in_a_later_epoch_from_a_small_state(student, chance):
    for steps in (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 3):
        check_resume(student, (EXAMPLES, GLOBAL_BATCH, SEED), 2, 4, steps)
    for _ in range(RANDOM_RUNS):
        run = drawn_run(chance)
        worlds = [drawn_world_size(chance, run[1]) for _ in range(2)]
        steps_per_epoch = run[0] // run[1]
        check_resume(student, run, *worlds, steps=int(chance.integers(1, 5)) * steps_per_epoch)
        check_resume(student, run, *worlds, steps=int(chance.integers(1, 4 * steps_per_epoch + 1)))
    sampler = student.make_sampler(5000, 100, 0, 1, SEED)
    for _ in range(177):
        sampler.next_batch()
    size = len(json.dumps(sampler.state_dict()))
    assert size <= LARGEST_STATE, (
        f"5000 examples, 27 steps into the fourth epoch: the state has {size} characters of JSON; "
        f"expected at most {LARGEST_STATE}: store where the run stands, not what it has read"
    )


def check_epochs(student, run, world_size, epochs):
    """Equal shares, example numbers that exist, and none twice in an epoch."""
    examples, global_batch, _ = run
    share = global_batch // world_size
    ranks = samplers(student, run, world_size)
    orders = []
    for epoch in range(epochs):
        order = []
        for step in range(examples // global_batch):
            batches = [rank.next_batch() for rank in ranks]
            sizes = [len(batch) for batch in batches]
            assert sizes == [share] * world_size, (
                f"{named(run)}: {world_size} ranks share a global batch, expected {share} examples "
                f"each, got {sizes}"
            )
            seen = [int(example) for batch in batches for example in batch]
            place = f"{named(run)}, {world_size} ranks, epoch {epoch}, step {step}"
            kinds = {type(batch).__name__ for batch in batches}
            assert kinds == {"list"}, f"{place}: expected lists of numbers, got {kinds}"
            numbers = {type(example).__name__ for batch in batches for example in batch}
            assert numbers == {"int"}, f"{place}: expected ints of Python, got {numbers}"
            assert all(0 <= example < examples for example in seen), (
                f"{place}: the examples are numbered 0 to {examples - 1}; got {sorted(seen)}"
            )
            repeated = {e for e in seen if seen.count(e) > 1} | (set(seen) & set(order))
            assert not repeated, f"{place}: the examples {sorted(repeated)} come twice in one epoch"
            order.extend(seen)
        orders.append(order)
    if examples > 50:  # of so many, two orders are equal by mistake only
        assert orders[0] != sorted(orders[0]), f"{named(run)}: the first epoch is not shuffled"
        assert orders[0] != orders[1], f"{named(run)}: the second epoch has the order of the first"


def check_every_example_is_read(student, chance):
    """Each epoch leaves others out, so none is left out for ever."""
    examples = int(chance.integers(15, 20))
    run = (examples, 10, int(chance.integers(1000)))
    epochs = 80  # half are left out each time: the chance that one always is, is below 2^-70
    read = {example for batch in global_batches(student, run, 2, epochs) for example in batch}
    never = sorted(set(range(examples)) - read)
    assert not never, (
        f"{named(run)}: after {epochs} epochs of one step the examples {never} were never read"
    )


def check_order_is_shuffled(student, chance):
    """No rotation, no constant stride, no shuffling of near neighbours or of whole batches."""
    run = (60, 1, int(chance.integers(1000)))
    order = [batch[0] for batch in global_batches(student, run, 1, 60)]
    strides = {(b - a) % 60 for a, b in zip(order, order[1:], strict=False)}
    far = float(np.mean(np.abs(np.array(order) - np.arange(60))))  # 20 on average, give or take 1.7
    assert len(strides) > 15 and far > 8, (
        f"{named(run)}: the first epoch's order is no random permutation: {order}"
    )
    check_orders_are_unrelated(student, run)
    run = (120, 4, run[2])
    batches = [tuple(batch) for batch in global_batches(student, run, 1, 60)]
    again = set(batches[:30]) & set(batches[30:])
    assert len(again) < 5, (
        f"{named(run)}: {len(again)} of the second epoch's 30 batches are batches of the first: "
        "permute the examples, not the batches"
    )


def check_orders_are_unrelated(student, run):
    """No epoch's order is the first one's turned round, moved along or renumbered."""
    examples, _, seed = run
    found = global_batches(student, run, 1, 4 * examples)
    orders = np.array(found).reshape(4, examples)
    first = orders[0].tolist()
    neighbours = {frozenset(pair) for pair in zip(first, first[1:] + first[:1], strict=True)}
    for epoch, order in enumerate(orders[1:], start=1):
        pairs = zip(order.tolist(), np.roll(order, -1).tolist(), strict=True)
        kept = sum(frozenset(pair) in neighbours for pair in pairs)  # 2 on average by chance
        apart = int(np.bincount((order - orders[0]) % examples).max())  # 5 or so by chance
        assert kept < 20 and apart < 20, (
            f"{named(run)}: epoch {epoch} has {kept} of {examples} neighbours in common with epoch "
            f"0, and {apart} examples differ from those of epoch 0 by the same number: draw a new "
            "permutation in each epoch"
        )


def check_private_randomness(student, chance):
    run = (EXAMPLES, GLOBAL_BATCH, int(chance.integers(1000)))
    arguments = (*run[:2], 0, 1, run[2])
    first, drawn = batches_and_next_draws(student, 1, 4, *arguments)
    other, _ = batches_and_next_draws(student, 2, 4, *arguments)
    assert other == first, (
        f"{named(run)}: the same seed gives other batches when the global random state differs; "
        "use a generator of your own"
    )
    expected = random.Random(1).random(), float(np.random.RandomState(1).random())
    assert drawn == expected, (
        f"{named(run)}: the sampler changes the global random state of `random` or NumPy, which "
        "belongs to the model; use a generator of your own"
    )
    check_seeds_share_nothing(student, run[2])
    here = [student.make_sampler(*arguments).next_batch()]
    told = batches_elsewhere(student, 1, *arguments)
    assert told == repr(here), (
        f"{named(run)}: the first batch is {here[0]} here and {told[:200]} in another Python "
        "process, as a restarted run is one; do not use what depends on PYTHONHASHSEED"
    )
    batches = global_batches(student, run, 1, 5)
    one, two = (student.make_sampler(*run[:2], 0, 1, run[2]) for _ in range(2))
    for step in range(5):
        pair = [sorted(int(example) for example in sampler.next_batch()) for sampler in (one, two)]
        assert pair == [batches[step], batches[step]], (
            f"{named(run)}, step {step}: two equal samplers in one process read {pair[0]} and "
            f"{pair[1]}, one alone reads {batches[step]}"
        )


def check_seeds_share_nothing(student, seed):
    run, steps = (50, 20, seed), 2100  # 1050 epochs of two steps; few train for longer
    batches = {
        tuple(batch): step for step, batch in enumerate(batches_of(student, steps, *of(run)))
    }
    for apart in (1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6, 2**16, 2**20):
        other = (50, 20, seed + apart)
        few = batches_of(student, 100, *of(other))
        shared = [(step, batch) for step, batch in enumerate(few) if tuple(batch) in batches]
        for step, batch in shared:
            raise AssertionError(
                f"{named(run)} and seed {seed + apart}: epoch {batches[tuple(batch)] // 2} of the "
                f"one and epoch {step // 2} of the other share the batch {batch}; two seeds, near "
                "or far, must share no epoch"
            )


def of(run):
    """The arguments of the sampler of a run's only rank."""
    examples, global_batch, seed = run
    return examples, global_batch, 0, 1, seed


def check_refused(student, arguments, *numbers):
    examples, global_batch, rank, world_size = arguments
    case = f"{examples} examples, a global batch of {global_batch}, {world_size} ranks"
    try:
        student.make_sampler(examples, global_batch, rank, world_size, 0)
    except ValueError as error:
        assert all(str(number) in str(error) for number in numbers), (
            f"{case}: the ValueError does not name both {numbers[0]} and {numbers[1]}: {error}"
        )
    else:
        raise AssertionError(f"{case}: expected a ValueError")


def check_resume(student, run, before, after, steps):
    """A run of `steps` steps at one world size, continued at another, equals the unbroken run."""
    steps_per_epoch = run[0] // run[1]
    unbroken = global_batches(student, run, 1, steps + steps_per_epoch + 1)
    ranks = samplers(student, run, before)
    for _ in range(steps):
        for rank in ranks:
            rank.next_batch()
    states = [json.dumps(rank.state_dict(), sort_keys=True) for rank in ranks]
    assert len(set(states)) == 1, f"the ranks' states differ: {states[0]} and {states[-1]}"
    resumed = samplers(student, run, after)
    resumed[-1].next_batch()  # a sampler that was in use forgets where it stood
    kept, given = json.loads(states[0]), [json.loads(states[0]) for _ in resumed]
    for rank, state in zip(resumed, given, strict=True):
        rank.load_state_dict(state)
        assert state == kept, "load_state_dict changes the state that it is given"
    told = resumed[0].state_dict()
    at_first = json.dumps(told)
    for step in range(steps, len(unbroken)):
        got = sorted(int(example) for rank in resumed for example in rank.next_batch())
        assert got == unbroken[step], (
            f"{named(run)}, saved after {steps} steps by {before} ranks, resumed by {after}: step "
            f"{step} reads {got}, the unbroken run {unbroken[step]}"
        )
    assert all(state == kept for state in given), "a step changes a state that was loaded before"
    assert json.dumps(told) == at_first, (
        f"a state that was told after {steps} steps is {told} some steps later, and was {at_first}"
    )


def drawn_run(chance):
    """(num_examples, global_batch, seed); the batch may divide the examples, or be all of them."""
    global_batch = int(chance.choice([1, 2, 6, 12, 13, 16]))
    examples = global_batch * int(chance.integers(1, 10)) + int(chance.integers(global_batch))
    return examples, global_batch, int(chance.integers(10**6))


def drawn_world_size(chance, global_batch):
    return int(chance.choice(divisors(global_batch)))


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def named(run):
    examples, global_batch, seed = run
    return f"{examples} examples, global batch {global_batch}, seed {seed}"


def global_batches(student, run, world_size, steps):
    """The sorted examples of all ranks together at each step."""
    ranks = samplers(student, run, world_size)
    return [
        sorted(int(example) for rank in ranks for example in rank.next_batch())
        for _ in range(steps)
    ]


def samplers(student, run, world_size):
    examples, global_batch, seed = run
    return [
        student.make_sampler(examples, global_batch, rank, world_size, seed)
        for rank in range(world_size)
    ]
