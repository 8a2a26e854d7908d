"""Chapter 1's four workloads: the queue's arithmetic, the counted FLOPs, and wrong flags."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workloads
from distlab.errors import UsageError
from distlab.model import Llama, ModelConfig
from distlab.queueing import mean_wait, poisson_arrivals, waits
from intro import work

SHAPE = ModelConfig(256, 64, 128, 2, 4, 4)


def test_one_at_a_time_the_second_waits_for_the_first():
    server = serve_all([0.0, 1.0, 1.5, 9.0], max_batch=1, seconds=2.0)
    np.testing.assert_allclose(server.wait, [0, 1, 2.5, 0])
    np.testing.assert_allclose(server.latency, [2, 3, 4.5, 2])
    assert (sum(server.services), server.clock) == (8.0, 11.0)  # from 6 to 9 it idles


def test_those_that_wait_are_served_together():
    server = serve_all([0.0, 1.0, 1.5, 1.6, 9.0], max_batch=2, seconds=2.0)
    np.testing.assert_allclose(server.wait, [0, 1, 0.5, 2.4, 0])
    np.testing.assert_allclose(server.latency - server.wait, 2.0)


def test_the_queue_waits_as_pollaczek_and_khinchine_say():
    services = np.random.default_rng(1).gamma(shape=4.0, scale=0.25, size=20_000)  # mean 1
    drawn = iter(services)
    server = workloads.Server(poisson_arrivals(0.7, len(services)), max_batch=1)
    while not server.done:
        server.serve_next(lambda batch: next(drawn))
    # 20,000 correlated waits: their mean is known to about 5 %, and the seed is fixed
    assert server.wait.mean() == pytest.approx(mean_wait(0.7, services), rel=0.1)


def test_lindleys_recursion_by_hand():
    np.testing.assert_allclose(waits(np.array([0.0, 1.0, 1.5, 9.0]), 2.0), [0, 1, 2.5, 0])


def test_a_constant_service_time_waits_as_in_m_d_1():
    assert mean_wait(0.5, np.array([1.0])) == pytest.approx(0.5)  # load / (2 (1 - load))
    assert mean_wait(0.4, np.array([2.0])) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="no steady state"):
        mean_wait(1.0, np.array([1.0]))


def test_arrivals_have_their_rate_and_keep_their_pattern():
    slow, fast = poisson_arrivals(2.0, 5000, seed=3), poisson_arrivals(4.0, 5000, seed=3)
    np.testing.assert_allclose(slow, 2 * fast)
    gaps = np.diff(slow)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)  # 5,000 gaps: known to 1.4 %
    assert gaps.std() == pytest.approx(0.5, rel=0.05)  # exponential: as wide as its mean


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["training_step", "prefill", "decode"])
def test_flops_are_those_that_torch_counts(name, batch):
    model = Llama(SHAPE)
    done = getattr(work, name)(model, batch, 32)
    with FlopCounterMode(display=False) as counter:
        done.run()
    # torch counts no attention kernel of the CPU; here it is at most a tenth of the rest
    assert counter.get_total_flops() == pytest.approx(done.flops, rel=0.12)
    assert done.tokens == (batch if name == "decode" else 32 * batch)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--loads", "0.5", "1"], "--loads 1"),
        (["--loads", "0", "0.5"], "--loads 0"),
        (["--loads", "0.5"], "--loads 0.5 is one load"),
        (["--repeats", "2"], "--repeats 2"),
        (["--kv-heads", "3"], "--kv-heads 3"),
    ],
)
def test_wrong_flags_are_named(flags, named):
    with pytest.raises(UsageError, match=named):
        workloads.parse_args(["--preset", "smoke", *flags])


def test_a_decode_step_reads_its_cache_and_its_weights():
    model = Llama(SHAPE).to(torch.bfloat16)
    done = work.decode(model, 2, 32)
    weights = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 2 * 2 * 32 * 64  # keys and values, layers, batch, tokens, elements
    assert done.bytes_moved == 2 * (weights + cache)


def serve_all(arrivals: list[float], max_batch: int, seconds: float):
    server = workloads.Server(np.array(arrivals), max_batch)
    while not server.done:
        server.serve_next(lambda batch: seconds)
    return server
