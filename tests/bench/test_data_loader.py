"""The loader: disjoint over ranks, every window once an epoch, and exact resumption at any K."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distlab.data import Loader, Tokens
from distlab.data.prefetch import Prefetcher
from distlab.errors import UsageError

unhurried = settings(deadline=None)  # other work on the machine is no failure


def stream(length, pieces=1, fingerprint="data"):
    """Tokens 0, 1, 2 … in `pieces` shards of uneven length: a window's first token names it."""
    cuts = sorted({length * i * i // pieces**2 for i in range(1, pieces)} - {0})
    shards = np.split(np.arange(length, dtype=np.uint32), cuts)
    return Tokens(tuple(shards), length, fingerprint)


@st.composite
def jobs(draw):
    """Tokens of one window or more, a sequence length, a world size, a batch that it divides."""
    seq_len = draw(st.integers(1, 5))
    windows = draw(st.integers(1, 40))
    tokens = stream(windows * seq_len + draw(st.integers(1, seq_len)), draw(st.integers(1, 6)))
    world_size = draw(st.integers(1, 6))
    batch_size = world_size * draw(st.integers(1, 4))
    return tokens, seq_len, batch_size, world_size, draw(st.integers(0, 3))


def ranks(tokens, seq_len, batch_size, world_size, seed, prefetch=0):
    return [
        Loader(tokens, seq_len, batch_size, rank, world_size, seed, prefetch=prefetch)
        for rank in range(world_size)
    ]


def global_batch(loaders):
    """The ranks' batches put together, [B, seq_len] each."""
    batches = [next(loader) for loader in loaders]
    return tuple(torch.cat(part).tolist() for part in zip(*batches, strict=True))


@unhurried
@given(jobs())
def test_each_window_comes_once_an_epoch_and_ranks_are_disjoint(job):
    tokens, seq_len, batch_size, _, _ = job
    loaders = ranks(*job)
    count = tokens.num_windows(seq_len)
    assert count == (len(tokens) - 1) // seq_len
    # As many global batches as fill whole epochs.
    steps = math.lcm(count, batch_size) // batch_size
    seen = [row[0] // seq_len for _ in range(steps) for row in global_batch(loaders)[0]]
    for start in range(0, len(seen), count):
        assert sorted(seen[start : start + count]) == list(range(count))


@unhurried
@given(jobs(), st.integers(1, 3))
def test_targets_are_inputs_one_further_across_shard_borders(job, steps):
    _, seq_len, batch_size, world_size, _ = job
    for loader in ranks(*job):
        for _ in range(steps):
            inputs, targets = next(loader)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape == (batch_size // world_size, seq_len)
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(seq_len))


@unhurried
@given(jobs(), st.integers(0, 12), st.integers(1, 6), st.sampled_from([0, 2]))
def test_resume_at_any_step_with_any_world_size_gives_the_same_batches(
    job, steps, new_world_size, prefetch
):
    tokens, seq_len, batch_size, world_size, seed = job
    batch_size *= new_world_size  # both world sizes must divide it
    reference = ranks(tokens, seq_len, batch_size, 1, seed)
    before = ranks(tokens, seq_len, batch_size, world_size, seed, prefetch)
    for _ in range(steps):
        assert global_batch(before) == global_batch(reference)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in before]
    assert all(state == states[0] for state in states)
    after = ranks(tokens, seq_len, batch_size, new_world_size, seed + 1, prefetch)
    for loader in after:
        loader.load_state_dict(states[0])
    for _ in range(4):
        assert global_batch(after) == global_batch(reference)
    for loader in before + after:
        loader.close()


def test_the_order_is_the_seed_s_and_the_epoch_s_and_stays_so():
    orders = {
        (seed, epoch): tuple(Loader(stream(12), 1, 11, seed=seed).window_indices(11 * epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    # Written down, so that a change of ours or NumPy's which reorders old runs is noticed.
    assert orders[0, 0] == (3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9)


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(UsageError, match="--batch-size 6 .* 4 ranks; use 4 or 8"):
        Loader(stream(100), 4, 6, world_size=4)
    with pytest.raises(UsageError, match="--batch-size 2 .* 4 ranks; use 4$"):
        Loader(stream(100), 4, 2, world_size=4)


def test_too_few_tokens_for_one_window_are_refused():
    with pytest.raises(UsageError, match="--seq-len 8 needs 9 tokens .* has 8; use --seq-len 7"):
        Loader(stream(8), 8, 1)


def test_a_state_of_other_data_or_length_is_refused():
    state = Loader(stream(100), 4, 2).state_dict()
    with pytest.raises(UsageError, match="trained on other data"):
        Loader(stream(100, fingerprint="other"), 4, 2).load_state_dict(state)
    with pytest.raises(UsageError, match="--seq-len 5 .* use 4"):
        Loader(stream(100), 5, 2).load_state_dict(state)


def test_unigram_entropy_is_in_nats_over_all_shards():
    even = Tokens((np.array([0, 1]), np.array([2, 3])), 8, "")
    assert even.unigram_entropy() == pytest.approx(math.log(4))
    assert Tokens((np.array([5, 5, 5]),), 8, "").unigram_entropy() == 0


def test_an_error_while_prefetching_is_raised_where_its_batch_would_be():
    def make(count):
        if count == 2:
            raise OSError("the disk is gone")
        return torch.tensor(count), torch.tensor(count)

    prefetcher = Prefetcher(make, torch.device("cpu"), depth=3)
    assert [int(next(prefetcher)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetcher)
    prefetcher.close()


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_arrive_on_the_gpu(prefetch):
    here, there = (
        Loader(stream(1000), 8, 4, device=device, prefetch=prefetch) for device in ("cpu", "cuda")
    )
    for _ in range(50):
        for ours, theirs in zip(next(here), next(there), strict=True):
            assert theirs.is_cuda
            assert torch.equal(ours, theirs.cpu())
    here.close()
    there.close()
