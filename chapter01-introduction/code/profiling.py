"""One training step under the profiler: where its time and memory go, and what bounds it.

The step is timed by its four phases, profiled operator by operator, and taken apart once more to
count FLOPs, bytes and memory. A verdict names the bottleneck. To show that it can be trusted, one
can be planted:

    slow-input    each batch comes from a store that needs one and a half times a step
    tiny-kernels  the model is cut to a width of 16 and the batch to one short sequence, so that
                  hardly any arithmetic is left in an operator
    sync          each gradient's norm is read and reported, and training waits for the answer. On a
                  GPU, `.item()` makes the host wait for the device, and then the device has nothing
                  to do until the host goes on. A CPU has no device to wait for: there the wait is
                  for the answer alone, from another thread, one and a half steps in all

Run:
    python chapter01-introduction/code/profiling.py
    python chapter01-introduction/code/profiling.py --plant slow-input
    python chapter01-introduction/code/profiling.py --trace build/step.json

You should see: the share of data, forward, backward and optimizer, the operators that take most
time, the peak of the memory timeline beside its prediction, and a verdict with its evidence:
compute-bound or memory-bound without a plant, and with one the bottleneck that was planted. The
trace opens in https://ui.perfetto.dev or chrome://tracing.
"""

import os
import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from distlab import data, files, hardware, measure, predict, runtime, script
from distlab.display import quantity
from distlab.model import Llama, ModelConfig, add_model_flags, config_from_args
from distlab.script import Run
from intro.trainer import PHASES, Trainer
from intro.verdict import (
    BOUND,
    Evidence,
    Operator,
    StepAnatomy,
    bottleneck,
    call_seconds,
    least_seconds,
    read_profile,
)

PRESETS = {
    "smoke": {"model": "smoke", "seq_len": 128, "batch_size": 16, "corpus_mb": 1.0, "steps": 4},
    "laptop": {"model": "laptop", "seq_len": 128, "batch_size": 8, "corpus_mb": 8.0, "steps": 5},
    "gpu": {"model": "gpu", "seq_len": 1024, "batch_size": 16, "steps": 10, "dtype": "bfloat16"},
}
PLANTS = {"slow-input": "input-bound", "tiny-kernels": "launch-bound", "sync": "sync-bound"}
TINY_WIDTH, TINY_SEQ_LEN = 16, 16
WARMUP_STEPS, PROFILED_STEPS = 2, 3
SHOWN_OPERATORS = 10
FIGURE_POINTS = 400


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, runtime.distributed(seed=args.seed, device=args.device) as job:
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; no change on a CPU
        config = config_from_args(args)
        tokens = data.prepare_from_args(args, config.vocab_size, workers=hardware.machine().cores)
        config = planted_shape(args, config)
        with job.device:
            model = Llama(config)
        batches = data.Loader(tokens, args.seq_len, args.batch_size, device=job.device, prefetch=2)
        with Trainer(model, batches, job.device, args.dtype) as trainer:
            trainer.run(WARMUP_STEPS)
            trainer.plant(args.plant)
            seconds = report_phases(run, trainer, args.steps)
            evidence = report_profile(run, trainer, trace_file(args))
            anatomy = take_apart(trainer)
        report_memory(run, args, config, anatomy)
        report_verdict(run, args, config, evidence, anatomy.operators, seconds, job.device)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    group = parser.add_argument_group("profile")
    group.add_argument("--plant", choices=list(PLANTS), help="a bottleneck for the verdict to find")
    group.add_argument("--steps", type=script.positive_int, help="steps timed for the phases")
    group.add_argument("--trace", type=Path, metavar="FILE", help="the Chrome trace")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    files.refuse_unwritable_file("--trace", trace_file(args))
    return args


def trace_file(args: Namespace) -> Path:
    name = f"profile-{args.plant}.json" if args.plant else "profile.json"
    return args.trace or files.repo_root() / "build" / "chapter01" / name


def planted_shape(args: Namespace, config: ModelConfig) -> ModelConfig:
    """`config`, or with --plant tiny-kernels one of its kind with hardly any arithmetic."""
    if args.plant != "tiny-kernels":
        return config
    args.batch_size, args.seq_len = 1, TINY_SEQ_LEN
    # Cores that share so small an operator mostly wait for each other, on a busy machine for ever.
    torch.set_num_threads(1)
    return replace(
        config, hidden_size=TINY_WIDTH, intermediate_size=2 * TINY_WIDTH,
        num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=None,
    )  # fmt: skip


def report_phases(run: Run, trainer: Trainer, steps: int) -> float:
    """The shares of the phases, without a profiler that would slow them; a step's seconds."""
    taken = trainer.run(steps)
    medians = {name: statistics.median(taken.phases[name]) for name in PHASES}
    step = sum(medians.values())
    rows = [[name, 1e3 * medians[name], 100 * medians[name] / step] for name in PHASES]
    run.table("phases", ["phase", "median ms", "% of step"], rows)
    run.metric("step_time", step, "s", f"{steps} steps")
    together = sum(map(sum, taken.phases.values())) / steps
    run.check_close(
        "the phases make up the step", together, taken.seconds, tolerance=0.05, relative=True
    )
    return step


def report_profile(run: Run, trainer: Trainer, trace: Path) -> Evidence:
    """Profile a few steps: the operators that take most time, and a trace to open."""
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    os.environ["KINETO_LOG_LEVEL"] = "99"  # its lines on stderr are for its own developers
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        profiled = trainer.run(PROFILED_STEPS)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    busiest = sorted(
        (one for one in profiler.key_averages() if one.key.startswith("aten::")),
        key=lambda one: -getattr(one, attribute),
    )
    total = sum(getattr(one, attribute) for one in busiest)
    rows = [
        [one.key, one.count / PROFILED_STEPS, getattr(one, attribute) / PROFILED_STEPS / 1e3,
         100 * getattr(one, attribute) / total]
        for one in busiest[:SHOWN_OPERATORS]
    ]  # fmt: skip
    columns = ["operator", "calls per step", "ms per step", "% of operators"]
    run.table("operators", columns, rows)
    with files.atomic_write(trace) as temporary:
        profiler.export_chrome_trace(str(temporary))
    run.metric("trace_size", trace.stat().st_size, "B")
    run.print(f"trace: {os.path.relpath(trace)}")
    return read_profile(profiler.events(), profiled.blocked_seconds)


def take_apart(trainer: Trainer) -> StepAnatomy:
    """One more step, in which every operator's FLOPs, bytes and memory are noted."""
    with StepAnatomy(trainer.model.parameters(), trainer.device) as anatomy:
        trainer.step(anatomy.mark)
    return anatomy


def report_memory(run: Run, args: Namespace, config: ModelConfig, anatomy: StepAnatomy) -> None:
    """What is alive over the step: the state stays, gradients and activations come and go."""
    a = config.architecture
    parameters = measure.tensor_bytes(anatomy.parameters)
    state = {"parameters": parameters, "optimizer state": 2 * parameters}  # AdamW's two moments
    every = max(1, len(anatomy.operators) // FIGURE_POINTS)
    x = list(range(0, len(anatomy.operators), every))
    changing = {"gradients": anatomy.gradients, "activations": anatomy.activations}
    series = [{"label": name, "x": x, "y": [size / 1e6] * len(x)} for name, size in state.items()]
    series += [
        {"label": name, "x": x, "y": [sizes[i] / 1e6 for i in x]}
        for name, sizes in changing.items()
    ]
    run.figure(
        "memory_timeline", kind="area", title="Memory over one training step",
        x_label="operators run", y_label="memory (MB)", series=series,
        lines=[{"label": name, "x": anatomy.marks[name]} for name in PHASES[1:]],
    )  # fmt: skip
    precision = "autocast" if args.dtype == "bfloat16" else "fp32"
    predicted = predict.peak_activations(a, precision, args.seq_len, args.batch_size)
    both = zip(anatomy.gradients, anatomy.activations, strict=True)
    peak = max(gradients + activations for gradients, activations in both)
    fixed = sum(state.values())
    run.compare("peak memory of the step", fixed + predicted, fixed + peak, "B")
    run.check_below(
        "no activation outlives the step, as a share of the peak",
        anatomy.activations[-1] / max(anatomy.activations), 0.01,
    )  # fmt: skip


def report_verdict(
    run: Run,
    args: Namespace,
    config: ModelConfig,
    evidence: Evidence,
    operators: list[Operator],
    seconds: float,
    device: torch.device,
) -> None:
    flops = sum(one.flops for one in operators)
    traffic = sum(one.bytes_moved for one in operators)
    tokens = args.batch_size * args.seq_len
    predicted = tokens * predict.training_flops_per_token(config.architecture, args.seq_len)
    run.compare("FLOPs of the step", predicted, flops, "FLOP")
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    peak = hardware.measured_peak_flops(device, dtype)
    bandwidth = hardware.measured_bandwidth(device)
    call = call_seconds(device)
    least = least_seconds(
        operators, lambda kind: hardware.measured_peak_flops(device, kind), bandwidth, call
    )
    for name, share in (
        ("waiting for input", evidence.waiting_for_input),
        ("blocked in synchronisation", evidence.blocked_in_sync),
        ("calling and launching operators", evidence.launching),
        ("computing", evidence.computing),
    ):
        run.metric(name, 100 * share, "%", "of the profiled time")
    run.metric("mean_operator", evidence.mean_operator_seconds, "s")
    run.metric(
        "operators_per_second",
        evidence.operators / evidence.seconds,
        "1/s",
        note=f"calling one that does nothing takes {quantity(call, 's')}",
    )
    run.metric("achieved", flops / seconds, "FLOP/s", f"measured peak {quantity(peak, 'FLOP/s')}")
    run.metric(
        "moved", traffic / seconds, "B/s", f"measured bandwidth {quantity(bandwidth, 'B/s')}"
    )
    for name, limit in least.items():
        run.metric(f"least time of {name} operators", limit, "s")
    verdict = bottleneck(evidence, least)
    run.extra(verdict=verdict)
    run.print(f"verdict: the step is {verdict}")
    expected = (PLANTS[args.plant],) if args.plant else ("compute-bound", "memory-bound")
    name = "the verdict names what was planted" if args.plant else "no wait is the bottleneck"
    run.check_true(name, verdict in expected, f"threshold {100 * BOUND:.0f} % of the step")


if __name__ == "__main__":
    script.exit(main)
