"""Measuring: the right statistics, the right order, and memory to a stated tolerance."""

import itertools

import numpy as np
import pytest
import torch

from distlab import measure

MB = 10**6


def test_median_and_quartiles_of_known_samples():
    timing = measure.Timing((0.005, 0.001, 0.002, 0.004, 0.003))
    assert (timing.q1, timing.median, timing.q3) == pytest.approx((0.002, 0.003, 0.004))
    assert str(timing) == "3.00 ms (quartiles 2.00 ms to 4.00 ms, n=5)"
    assert measure.Timing((1.0, 2.0, 3.0, 4.0)).median == 2.5


def test_ratios_compare_each_sample_with_its_twin_of_the_same_turn():
    slow, quick = measure.Timing((2.0, 8.0, 3.0)), measure.Timing((1.0, 4.0, 1.0))
    assert slow.ratios(quick) == [2.0, 2.0, 3.0]
    with pytest.raises(ValueError):
        slow.ratios(measure.Timing((1.0, 2.0)))


def test_functions_are_timed_in_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    calls: list[str] = []
    timings = measure.compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=2, repeats=3
    )
    assert "".join(calls) == "aabb" + "ababab"
    assert next(clock) == 2 * 6  # two readings for each of six samples, none for the warm-up
    assert {name: timing.samples for name, timing in timings.items()} == {
        "a": (1.0, 1.0, 1.0),
        "b": (1.0, 1.0, 1.0),
    }


def test_measure_counts_its_calls():
    calls: list[int] = []
    timing = measure.measure(lambda: calls.append(1), warmup=1, repeats=4)
    assert len(calls) == 5 and len(timing.samples) == 4
    assert all(sample >= 0 for sample in timing.samples)


@pytest.mark.parametrize("repeats", [0, 1, 2])
def test_fewer_than_three_repeats_are_refused_before_anything_runs(repeats):
    with pytest.raises(ValueError, match=f"{repeats} repeats give no median"):
        measure.measure(lambda: pytest.fail("it ran"), repeats=repeats)


def test_an_error_in_what_is_measured_passes_through():
    with pytest.raises(ZeroDivisionError):
        measure.measure(lambda: 1 / 0)


def test_tensor_bytes_counts_each_storage_once():
    base = torch.zeros(1000, dtype=torch.float32)
    tied = torch.nn.Linear(10, 20, bias=False)
    assert measure.tensor_bytes([]) == 0
    assert measure.tensor_bytes([torch.zeros(0)]) == 0
    assert measure.tensor_bytes([base]) == 4000
    assert measure.tensor_bytes([base, base, base.view(10, 100), base[5:9]]) == 4000
    assert measure.tensor_bytes([base[5:9]]) == 4000  # a view keeps the whole storage alive
    assert measure.tensor_bytes([base, base.clone()]) == 8000
    assert measure.tensor_bytes([tied.weight, tied.weight.T, tied.weight.detach()]) == 800
    assert measure.tensor_bytes(iter([base, torch.zeros(3, dtype=torch.bfloat16)])) == 4006
    assert measure.tensor_bytes([torch.zeros(10**9, device="meta")]) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_opaque_tensors_count_by_their_numbers():
    packed, plain = torch.zeros(10, 20).to_mkldnn(), torch.zeros(7)
    assert measure.tensor_bytes([packed, plain, packed]) == 800 + 28
    with measure.LiveBytes() as live:
        weight = torch.zeros(10, 20)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        assert live.bytes == 1600
        del packed
        torch.zeros(0)  # what the last operator has made is held until the next
        assert live.bytes == 800


def test_tensor_bytes_takes_the_longest_of_storages_that_begin_at_the_same_place():
    array = np.zeros(1000, dtype=np.uint8)
    whole, start = torch.from_numpy(array), torch.from_numpy(array[:10])
    assert measure.tensor_bytes([whole, start]) == measure.tensor_bytes([start, whole]) == 1000


def test_peak_memory_sees_an_allocation_that_is_freed_before_the_end():
    with measure.PeakMemory() as peak:
        block = torch.ones(50 * MB, dtype=torch.float32)
        del block
        torch.ones(1)
    # Resident memory is counted in pages, and other threads of this process may take some: 10 %.
    assert peak.bytes == pytest.approx(200 * MB, rel=0.1)


def test_peak_memory_counts_only_what_is_above_the_beginning():
    held = torch.ones(25 * MB, dtype=torch.float32)
    with measure.PeakMemory() as peak:
        held.add_(1)
    assert 0 <= peak.bytes < 10 * MB


def test_peak_memory_is_there_after_an_error_and_its_thread_is_gone():
    with pytest.raises(ZeroDivisionError), measure.PeakMemory() as peak:
        block = torch.ones(25 * MB, dtype=torch.float32)
        raise ZeroDivisionError
    assert peak.bytes == pytest.approx(100 * MB, rel=0.1)
    assert not peak._sampler.is_alive()
    del block
