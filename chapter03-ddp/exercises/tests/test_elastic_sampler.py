"""Task 5: jobs of several ranks that grow and shrink, step by step."""

import json
import math

EXAMPLES, BATCH, SEED = 103, 4, 17
WORLD_SIZES = (1, 2, 3, 5, 8)


def job(student, world_size, seed=SEED, examples=EXAMPLES):
    return [student.make_sampler(examples, BATCH, r, world_size, seed) for r in range(world_size)]


def step(samplers):
    """One step of all ranks: their batches."""
    return [[int(example) for example in sampler.next_batch()] for sampler in samplers]


def epoch(samplers, examples=EXAMPLES):
    """The steps of an epoch, if a step takes world_size * BATCH examples."""
    return [step(samplers) for _ in range(math.ceil(examples / (len(samplers) * BATCH)))]


def flat(steps):
    return [example for batches in steps for batch in batches for example in batch]


def assert_whole(taken, examples, case):
    missing = sorted(set(range(examples)) - set(taken))
    assert not missing, f"{case}: {missing[:5]} of {examples} examples were left out"
    twice = sorted({example for example in taken if taken.count(example) > 1})
    assert not twice, f"{case}: {twice[:5]} were taken more than once"
    assert len(taken) == examples, f"{case}: examples that do not exist were taken"


def test_an_epoch_is_every_example_once(student):
    orders = {}
    for world_size in WORLD_SIZES:
        samplers = job(student, world_size)
        for number in range(3):
            steps = epoch(samplers)
            case = f"epoch {number} of {EXAMPLES} examples on {world_size} ranks"
            assert_whole(flat(steps), EXAMPLES, case)
            orders[world_size, number] = [set(flat([batches])) for batches in steps]
    assert orders[1, 0] != orders[1, 1], "epoch 1 has the order of epoch 0"
    other = [set(flat([batches])) for batches in epoch(job(student, 1, seed=SEED + 1))]
    assert orders[1, 0] != other, "two seeds give the same order"
    first = [set().union(*orders[1, 0][i : i + 8]) for i in range(0, len(orders[1, 0]), 8)]
    assert first == orders[8, 0], (
        "the first 32 examples of an epoch are not the same set on 1 rank (8 steps) and on 8 (one)"
    )


def test_the_world_may_change_at_any_step(student):
    for worlds in ([4, 3], [1, 5, 2], [3, 8, 1, 2], [2, 1, 2, 1, 2]):
        taken, state = [], None
        samplers = job(student, worlds[0])
        for place, world_size in enumerate(worlds):
            if state is not None:
                samplers = resumed(student, world_size, state)
            last = place == len(worlds) - 1
            while len(taken) < EXAMPLES if last else len(taken) < (place + 1) * 17:
                batches = step(samplers)
                assert any(batches), f"worlds {worlds}: no rank gets an example, {len(taken)} taken"
                taken += flat([batches])
            state = told_state(samplers, f"worlds {worlds}")
        case = f"an epoch of {EXAMPLES} examples in worlds of {worlds} ranks, one after another"
        assert_whole(taken, EXAMPLES, case)
        assert_whole(flat(epoch(samplers)), EXAMPLES, f"the epoch after worlds of {worlds}")


def told_state(samplers, case):
    """The state as a checkpoint keeps it."""
    states = [json.dumps(sampler.state_dict(), sort_keys=True) for sampler in samplers]
    assert len(set(states)) == 1, f"{case}: the ranks' states differ: {sorted(set(states))[:2]}"
    assert len(states[0]) < 200, f"{case}: the state has {len(states[0])} characters"
    return json.loads(states[0])


def resumed(student, world_size, state):
    samplers = job(student, world_size)
    for sampler in samplers:
        sampler.load_state_dict(state)
    return samplers


def test_the_short_end_is_shared_evenly(student):
    for world_size in WORLD_SIZES:
        for examples in (1, 2, 7, 33, EXAMPLES):
            steps = epoch(job(student, world_size, examples=examples), examples)
            for number, batches in enumerate(steps):
                sizes = [len(batch) for batch in batches]
                left = min(world_size * BATCH, examples - number * world_size * BATCH)
                case = (
                    f"step {number} of {examples} examples on {world_size} ranks with batches of "
                    f"{BATCH}"
                )
                assert sum(sizes) == left, f"{case}: {sum(sizes)} examples taken, {left} are next"
                assert max(sizes) - min(sizes) <= 1, f"{case}: the batches have {sizes} examples"


def test_a_state_resumes_exactly(student):
    for world_size in (1, 3):
        samplers = job(student, world_size)
        for number in range(30):
            state = told_state(samplers, f"{world_size} ranks, after {number} steps")
            again = resumed(student, world_size, state)
            unbroken, broken = step(samplers), step(again)
            assert broken == unbroken, (
                f"{world_size} ranks, resumed after {number} steps: the next batches are {broken}, "
                f"without the break they were {unbroken}"
            )
