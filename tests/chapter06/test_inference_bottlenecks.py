"""Bounds of prefill and decode: bytes and FLOPs by hand, where decode turns, bad input."""

import json

import pytest
import torch

import inference_bottlenecks
from distlab.errors import UsageError
from distlab.model import SIZES, Llama
from inference import passes


@pytest.fixture
def rig():
    torch.manual_seed(0)
    return passes.Rig(Llama(SIZES["smoke"]), context=10)


# By hand, for the smoke size: layers of 4·64·64·(1 + 1/2) / 2 + 3·64·176 weights, a head of 512·64.
LAYERS, HEAD = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176), 512 * 64
CACHE = 2 * 2 * 32 * 4  # bytes of a token: keys and values, 2 layers of 2 heads of 16, float32


def test_a_decode_step_by_hand(rig):
    step = rig.decode(3)
    assert step.products == 3 * 2 * (LAYERS + HEAD)
    assert step.attention == 3 * 10 * 2 * 4 * 64  # a token sees 10 of them, itself included
    assert step.bytes_moved == 4 * (LAYERS + HEAD) + 3 * (10 + 1) * CACHE
    assert step.size == 3


def test_a_prefill_needs_one_output_and_half_of_the_scores(rig):
    whole = rig.prefill(7)
    assert whole.products == 7 * 2 * LAYERS + 2 * HEAD
    assert whole.attention == 7 * (7 + 1) / 2 * 2 * 4 * 64
    assert whole.bytes_moved == 4 * (LAYERS + HEAD) + 2 * 7 * CACHE


def test_a_pass_can_be_repeated(rig):
    step = rig.decode(2)
    with torch.inference_mode():
        torch.testing.assert_close(step.run(), step.run(), rtol=0, atol=0)


def test_decode_turns_where_both_bounds_are_equal(rig):
    steps = [rig.decode(1), rig.decode(8)]
    machine = passes.Machine(peak=50e9, bandwidth=20e9)
    batch = passes.turning_batch(machine, steps)
    one, more = (rig.decode(n) for n in (100, 200))
    flops = one.flops + (more.flops - one.flops) * (batch - 100) / 100
    moved = one.bytes_moved + (more.bytes_moved - one.bytes_moved) * (batch - 100) / 100
    assert flops / machine.peak == pytest.approx(moved / machine.bandwidth)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_beyond_a_context_no_batch_turns(factor):
    model = Llama(SIZES["smoke"])
    machine = passes.Machine(peak=100e9, bandwidth=10e9)
    architecture = model.config.architecture
    short = passes.Rig(model, 64)
    limit = passes.turning_context(machine, architecture, [short.decode(1), short.decode(2)])
    assert 40 < limit < 2000
    rig = passes.Rig(model, round(factor * limit))
    turns = passes.turning_batch(machine, [rig.decode(1), rig.decode(2)])
    assert (turns is None) is (factor > 1)


def test_attention_that_computes_more_than_it_reads_always_turns(rig):
    machine = passes.Machine(peak=1e9, bandwidth=1e12)
    steps = [rig.decode(1), rig.decode(2)]
    assert passes.turning_context(machine, rig.a, steps) is None
    assert passes.turning_batch(machine, steps) is not None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--hidden", "100"], "--hidden 100 is no multiple of 64"),
        (["--repeats", "2"], "--repeats 2 gives no median"),
        (["--batches", "4", "4"], "--batches 4 is no sweep"),
        (["--prompts", "8"], "--prompts 8 is no sweep"),
        (["--device", "cuda"], "needs a GPU"),
    ],
)
def test_wrong_flags(monkeypatch, flags, why):
    monkeypatch.setattr(inference_bottlenecks.hardware, "has_cuda", lambda: False)
    with pytest.raises(UsageError, match=why):
        inference_bottlenecks.main(["--preset", "smoke", *flags])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_smoke_run(tmp_path, dtype):
    path = tmp_path / "run.json"
    flags = ["--preset", "smoke", "--device", "cpu", "--dtype", dtype, "--memory-mib", "2"]
    flags += ["--batches", "4", "1", "4", "--prompts", "2", "16", "--json", str(path)]
    assert inference_bottlenecks.main(flags) == 0
    record = json.loads(path.read_text())
    unjudged = [check for check in record["checks"] if check["detail"].startswith("not judged")]
    assert len(unjudged) == 3
    assert [row[0] for row in record["tables"]["decode"]["rows"]] == [1, 4]
    assert [row[0] for row in record["tables"]["prefill"]["rows"]] == [2, 16]
    assert set(record["figures"]) == {"inference_roofline", "inference_batching"}
    assert len(record["comparisons"]) == 4
