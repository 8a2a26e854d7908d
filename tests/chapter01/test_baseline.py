"""Chapter 1's training baseline: its step, its schedule, and what it says when it cannot."""

import argparse

import pytest
import torch

import single_gpu_baseline as baseline
from distlab.errors import RunError, UsageError
from distlab.model import SIZES, Llama
from distlab.runtime import Runtime
from distlab.script import Run


@pytest.fixture
def args() -> argparse.Namespace:
    return baseline.parse_args(["--preset", "smoke"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_learns_and_keeps_float32_weights(args, dtype):
    torch.manual_seed(0)
    model = Llama(SIZES["smoke"])
    step = baseline.make_step(model, baseline.new_optimizer(args, model), dtype, compiled=False)
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = [step(tokens[:, :-1], tokens[:, 1:]).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_schedule_warms_up_and_decays():
    factors = [baseline.schedule_at(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.001)


def test_norms_are_not_decayed(args):
    decayed, kept = baseline.new_optimizer(args, Llama(SIZES["smoke"])).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}


def test_flags_reach_the_model():
    flags = ["--preset", "smoke", "--gradient-checkpointing", "--loss-chunks", "4"]
    model = baseline.new_model(baseline.parse_args(flags), SIZES["smoke"], cpu_job())
    assert (model.gradient_checkpointing, model.loss_chunks) == (True, 4)


def test_the_clock_counts_the_steps_between_ticks():
    clock = baseline.StepClock(torch.device("cpu"))
    for _ in range(4):
        clock.tick()
    assert len(clock.seconds()) == 3
    assert min(clock.seconds()) >= 0


def test_an_unknown_gpu_has_no_mfu(args, monkeypatch, capsys):
    monkeypatch.setattr(baseline.hardware, "peak_flops", lambda device, dtype: None)
    training = baseline.Training([1.0] * 20, [0.1] * 20, 0, 0)
    job = Runtime(0, 1, 0, 1, torch.device("cuda", 0), "nccl")
    run = Run(args)
    baseline.report_speed(run, args, SIZES["smoke"], training, job)
    assert "MFU: unknown" in capsys.readouterr().out
    assert "mfu" not in run.metrics
    assert run.metrics["tokens_per_second"]["value"] == pytest.approx(16 * 64 / 0.1)


def test_too_little_memory_is_one_line():
    with (
        pytest.raises(RunError, match="use a smaller --batch-size"),
        baseline.memory_errors_in_one_line(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--steps", "10"], "--steps 10"), (["--repeats", "2"], "--repeats 2")],
)
def test_wrong_flags_are_named(flags, named):
    with pytest.raises(UsageError, match=named):
        baseline.parse_args(["--preset", "smoke", *flags])


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(baseline.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"install g\+\+"):
        baseline.parse_args(["--preset", "smoke", "--compile"])


def cpu_job() -> Runtime:
    return Runtime(0, 1, 0, 1, torch.device("cpu"), "gloo")
