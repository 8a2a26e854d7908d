"""Task 3: disjoint over ranks, the same run at every world size, and exact after a restart."""

import json
import random

import numpy as np

EXAMPLES, GLOBAL_BATCH, SEED = 103, 12, 7
STEPS_PER_EPOCH = EXAMPLES // GLOBAL_BATCH
LARGEST_STATE = 1000  # characters of JSON: constant, however long the run


def test_ranks_are_disjoint_and_cover_the_epoch(student):
    epochs = [[], []]
    ranks = samplers(student, world_size=3)
    for epoch in epochs:
        for step in range(STEPS_PER_EPOCH):
            batches = [rank.next_batch() for rank in ranks]
            sizes = [len(batch) for batch in batches]
            assert sizes == [4, 4, 4], (
                f"3 ranks share a global batch of 12: expected 4 examples each, got {sizes}"
            )
            seen = [int(example) for batch in batches for example in batch]
            assert all(0 <= example < EXAMPLES for example in seen), (
                f"step {step}: there are {EXAMPLES} examples, numbered from 0; got {sorted(seen)}"
            )
            repeated = {e for e in seen if seen.count(e) > 1} | (set(seen) & set(epoch))
            assert not repeated, (
                f"step {step}: the examples {sorted(repeated)} come twice in one epoch"
            )
            epoch.extend(seen)
    assert epochs[0] != sorted(epochs[0]), "the first epoch is not shuffled"
    assert epochs[0] != epochs[1], "the second epoch has the order of the first"
    check_private_randomness(student)


def check_private_randomness(student):
    random.seed(1)
    np.random.seed(1)
    first = global_batches(student, world_size=1, steps=4)
    random.seed(2)
    np.random.seed(2)
    assert global_batches(student, world_size=1, steps=4) == first, (
        "the same seed gives other batches when the global random state differs; "
        "use a generator of your own"
    )
    other = make(student, seed=SEED + 1)
    assert [sorted(other.next_batch()) for _ in range(4)] != first, (
        f"the seeds {SEED} and {SEED + 1} give the same batches"
    )


def test_global_batch_is_the_same_for_every_world_size(student):
    steps = STEPS_PER_EPOCH + 3
    alone = global_batches(student, world_size=1, steps=steps)
    for world_size in (2, 3, 4, 12):
        together = global_batches(student, world_size, steps)
        for step, (got, expected) in enumerate(zip(together, alone, strict=True)):
            assert got == expected, (
                f"step {step}: {world_size} ranks together read {got}, one rank reads {expected}"
            )
    try:
        make(student, world_size=5)
    except ValueError as error:
        assert "5" in str(error) and "12" in str(error), (
            f"the ValueError for 5 ranks and a global batch of 12 names not both: {error}"
        )
    else:
        raise AssertionError("5 ranks do not divide a global batch of 12: expected a ValueError")


def test_resumes_at_another_world_size(student):
    for before, after in ((2, 2), (4, 1), (1, 3), (3, 4)):
        check_resume(student, before, after, steps=5)


def test_resumes_in_a_later_epoch_from_a_small_state(student):
    for steps in (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 3):
        check_resume(student, 2, 4, steps)
    sampler = make(student)
    for _ in range(20 * STEPS_PER_EPOCH):
        sampler.next_batch()
    size = len(json.dumps(sampler.state_dict()))
    assert size <= LARGEST_STATE, (
        f"after 20 epochs the state has {size} characters of JSON; expected at most "
        f"{LARGEST_STATE}: store where the run stands, not what it has read"
    )


def check_resume(student, before, after, steps):
    """A run of `steps` steps at one world size, continued at another, equals the unbroken run."""
    unbroken = global_batches(student, 1, steps + STEPS_PER_EPOCH)
    ranks = samplers(student, before)
    for _ in range(steps):
        for rank in ranks:
            rank.next_batch()
    states = [json.dumps(rank.state_dict(), sort_keys=True) for rank in ranks]
    assert len(set(states)) == 1, f"the ranks' states differ: {states[0]} and {states[-1]}"
    resumed = samplers(student, after)
    for rank in resumed:
        rank.load_state_dict(json.loads(states[0]))
    for step in range(steps, steps + STEPS_PER_EPOCH):
        got = sorted(int(example) for rank in resumed for example in rank.next_batch())
        assert got == unbroken[step], (
            f"saved after {steps} steps by {before} ranks, resumed by {after}: step {step} reads "
            f"{got}, the unbroken run {unbroken[step]}"
        )


def global_batches(student, world_size, steps):
    """The sorted examples of all ranks together at each step."""
    ranks = samplers(student, world_size)
    return [
        sorted(int(example) for rank in ranks for example in rank.next_batch())
        for _ in range(steps)
    ]


def samplers(student, world_size):
    return [make(student, rank, world_size) for rank in range(world_size)]


def make(student, rank=0, world_size=1, seed=SEED):
    return student.make_sampler(EXAMPLES, GLOBAL_BATCH, rank, world_size, seed)
