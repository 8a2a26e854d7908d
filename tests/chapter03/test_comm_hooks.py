"""The int8 hook: its arithmetic, its error feedback, and its buckets; and the script around it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import comm_hooks
from comm_hooks import dequantise, quantise
from ddp.compression import OneBucket, all_reduced, exchanged_in_int8, low_rank
from ddp.compression_costs import bytes_sent
from distlab import script
from distlab.cluster import sweep
from distlab.errors import UsageError
from distlab.spawning import spawn

SMOKE = ["--preset", "smoke", "--device", "cpu", "--backend", "gloo"]
CHUNK = 8
SIZES = (1, CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 5, 1000)


def gradient_of(rank, size, step=0):
    """Uneven magnitudes, and a stretch of zeros that fills a chunk."""
    random = np.random.default_rng([rank, size, step])
    values = random.standard_normal(size) * 10 ** random.uniform(-4, 2, size)
    values[size // 3 : size // 3 + 2 * CHUNK] = 0
    return values.astype(np.float32)


def reference_round(values):
    """`values` [n] as an int8 message gives them back, by NumPy, chunk by chunk."""
    found = np.zeros_like(values)
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        scale = np.abs(chunk).max() / np.float32(127)
        if scale > 0:
            found[start : start + CHUNK] = np.rint(chunk / scale).astype(np.int8) * scale
    return found


def reference(gradients, residuals):
    """The averages and the new residuals of all ranks; [ranks][n], padded to whole shards."""
    workers = len(gradients)
    owed = [gradient + residual for gradient, residual in zip(gradients, residuals, strict=True)]
    rounded = [reference_round(values) for values in owed]
    total = np.sum(rounded, axis=0, dtype=np.float32)
    result = reference_round(total)
    shard = len(total) // workers
    kept = [values - known for values, known in zip(owed, rounded, strict=True)]
    for rank in range(workers):
        own = slice(rank * shard, (rank + 1) * shard)
        kept[rank][own] += (total - result)[own]
    return result / np.float32(workers), kept


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_three_steps_equal_numpy_bit_for_bit(world_size):
    ranks = spawn(three_steps, world_size, timeout_s=60)
    for size in SIZES:
        padding = -size % (world_size * CHUNK)
        residuals = [np.zeros(size + padding, np.float32)] * world_size
        for step in range(3):
            gradients = [
                np.pad(gradient_of(rank, size, step), (0, padding)) for rank in range(world_size)
            ]
            expected, residuals = reference(gradients, residuals)
            for rank in range(world_size):
                averaged, owed = ranks[rank][size][step]
                np.testing.assert_array_equal(averaged, expected[:size])
                np.testing.assert_array_equal(owed, residuals[rank][:size])


def three_steps(job):
    found = {}
    for size in SIZES:
        state, owner = comm_hooks.Int8State(chunk=CHUNK), nn.Parameter(torch.zeros(size))
        found[size] = []
        for step in range(3):
            own = torch.from_numpy(gradient_of(job.rank, size, step))
            averaged = comm_hooks.int8_hook(state, OneBucket(own, owner)).wait()
            found[size].append((averaged.numpy().copy(), state.owed([owner]).numpy()))
    return found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_reaches_every_rank_and_is_forgotten_afterwards(bad):
    for during, after in spawn(with_bad_value, 2, bad, timeout_s=60):
        assert np.isnan(during[3]), "it must not pass for a number"
        assert np.isfinite(during[CHUNK:]).all(), "the other chunks are as they were"
        assert np.isfinite(after).all(), "a residual of NaN would spoil every later step"


def with_bad_value(job, bad):
    state, owner = comm_hooks.Int8State(chunk=CHUNK), nn.Parameter(torch.zeros(64))
    spoiled = torch.ones(64)
    if job.rank == 1:
        spoiled[3] = bad
    during = comm_hooks.int8_hook(state, OneBucket(spoiled, owner)).wait().numpy().copy()
    after = comm_hooks.int8_hook(state, OneBucket(torch.ones(64), owner)).wait().numpy()
    return during, after


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=40),
    st.integers(1, 12).map(lambda n: 4 * n),
)
def test_rounding_takes_half_a_step_of_the_chunk_at_most(values, chunk):
    padded = torch.nn.functional.pad(torch.tensor(values), (0, -len(values) % chunk)).view(1, -1)
    message = quantise(padded, chunk)
    assert message.dtype == torch.int8
    assert message.shape == (1, padded.numel() + 4 * padded.numel() // chunk)
    found = dequantise(message, chunk, padded.device)
    steps = padded.unflatten(1, (-1, chunk)).abs().amax(-1) / 127
    error = (found - padded).abs().unflatten(1, (-1, chunk)).amax(-1)
    assert (error <= steps * 0.501 + 1e-44 * 127).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 40))
def test_with_feedback_the_sum_of_all_steps_is_off_by_one_rounding(seed, size, steps):
    """Of different gradients: what came back and what is owed make the sum, and little is owed."""
    random = torch.Generator().manual_seed(seed)
    owed = computed = applied = torch.zeros(1, size + -size % CHUNK)
    largest = 0.0
    for _ in range(steps):
        gradient = torch.zeros_like(owed)
        gradient[0, :size] = torch.randn(size, generator=random)
        largest = max(largest, float(gradient.abs().max()))
        message = dequantise(quantise(gradient + owed, CHUNK), CHUNK, owed.device)
        computed, applied = computed + gradient, applied + message
        owed = gradient + owed - message
    torch.testing.assert_close(applied + owed, computed, rtol=0, atol=1e-4 * largest)
    assert float(owed.abs().max()) <= largest / 127  # half a step, and what it adds to the next


def test_several_buckets_and_their_new_arrangement_keep_every_residual():
    """DDP puts other parameters into a bucket after the first step: each keeps what it is owed."""
    for found in spawn(many_buckets, 2, timeout_s=60):
        assert found.buckets[0] != found.buckets[-1], (
            "DDP did not rearrange; the test tests nothing"
        )
        assert len(found.buckets[-1]) > 2
        assert found.worst < 1e-5
        assert found.same


def many_buckets(job):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 80), nn.Linear(80, 64))
    replica = DDP(model, bucket_cap_mb=0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state, layouts = comm_hooks.Int8State(chunk=64), []

    def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.index() == 0:
            layouts.append([])
        layouts[-1].append([names[id(p)] for p in bucket.parameters()])
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            exact[names[id(parameter)]] += gradient  # before anything is averaged
        return comm_hooks.int8_hook(state, bucket)

    replica.register_comm_hook(state, hook)
    applied = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(job.rank)
    for _ in range(5):
        model.zero_grad()
        replica(torch.randn(4, 64, generator=generator)).square().mean().backward()
        for name, parameter in model.named_parameters():
            applied[name] += parameter.grad
    worst = 0.0
    for name, parameter in model.named_parameters():
        owed = state.owed([parameter]).view_as(parameter)
        mean = exact[name] - owed
        dist.all_reduce(mean)
        worst = max(worst, float((mean / 2 - applied[name]).abs().max()))
    digests = [None] * 2
    dist.all_gather_object(digests, [float(g.double().sum()) for g in applied.values()])
    return SimpleNamespace(buckets=layouts, worst=worst, same=digests[0] == digests[1])


def test_payloads_by_hand():
    shapes = [(100, 40), (10,), (3, 2)]
    assert all_reduced(4)(shapes, 2) == 4 * 4016
    assert all_reduced(2)(shapes, 4) == pytest.approx(1.5 * 2 * 4016)
    # 4016 elements on two ranks are four chunks of 1024; each has a scale of four bytes
    assert exchanged_in_int8(1024)(shapes, 2) == 4096 + 4 * 4
    assert exchanged_in_int8(1024)(shapes, 1) == 0
    # P and Q have 140 elements per rank; the vector and the small matrix go as they are
    assert low_rank(2)(shapes, 2) == 4 * (2 * 140 + 10 + 6)
    assert low_rank(1)([(4096,)], 2) == 4 * 4096


@pytest.mark.slow
def test_the_ranks_of_a_job_are_measured_with_every_hook():
    for checks, extras in spawn(measured_here, 2, timeout_s=120):
        assert [name for name, ok in checks if not ok] == []
        measured = {one["name"]: one for one in extras["measured"]}
        assert len(measured) == 9
        assert measured["int8"]["payload"] < measured["none"]["payload"] / 3.9
        for one in measured.values():
            assert len(one["losses"]) == 6 and np.isfinite(one["losses"]).all()
            assert one["wire"] is None and one["seconds"] > 0


def measured_here(job):
    args = comm_hooks.parse_args(SMOKE)
    with script.run(args) as run:
        comm_hooks.measure_ranks(run, args, job)
    return [(check.name, check.ok) for check in run.checks], run.extras


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "5"], "--steps 5 gives no median; use 6 or more"),
        (["--timed-steps", "2"], "--timed-steps 2 gives no median; use 3 or more"),
        (["--start-powersgd", "1"], "--start-powersgd 1 is before DDP has arranged"),
        (["--nodes", "1"], "--nodes 1 is no cluster; use 2 or more"),
        (["--rates", "100"], "--rates 100 is wrong because"),
        (["--heads", "3"], "3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(UsageError, match=words):
        comm_hooks.parse_args([*SMOKE, *flags])


def test_an_interface_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="--interface nowhere0 is none of this machine's"):
        bytes_sent("nowhere0")


def test_a_machine_without_virtual_clusters_skips(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweep, "unavailable", lambda: "no namespaces here")
    with pytest.raises(script.Skipped, match="no namespaces here"):
        comm_hooks.main(["--preset", "smoke"])
