"""One model, four workloads: a training step, prefill, decode, and serving under random arrivals.

The first three differ in arithmetic intensity, the FLOPs that they do per byte that they must read
or write. Above the machine's own ratio (its balance) compute is the limit, below it memory. The
fourth adds what no single request shows: waiting. Requests arrive at random (a Poisson process)
and are served in order, and the wait is compared with queueing theory's.

Run:
    python chapter01-introduction/code/workloads.py
    python chapter01-introduction/code/workloads.py --loads 0.5 0.8 0.9 --figures build/figures

You should see: training and prefill do many times more FLOPs per byte than decode; decode gains
from a larger batch, since it reads the weights once for all of it; and the wait, nothing at a load
of 0.3, becomes many times the service time as the load nears 1: the knee.
"""

import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch

from distlab import hardware, measure, predict, runtime, script
from distlab.model import Llama, add_model_flags, config_from_args, model_from_args
from distlab.queueing import mean_wait, poisson_arrivals, waits
from distlab.script import Run, UsageError
from intro.work import Server, Workload, decode, endless_wait, prefill, random_tokens, training_step

PRESETS = {
    "smoke": {"model": "smoke", "train_batch_size": 4, "batch_sizes": [1, 4, 16], "context": 64,
              "repeats": 9, "requests": 60, "prompt_tokens": 16, "output_tokens": 4},
    "laptop": {"model": "laptop", "train_batch_size": 4, "batch_sizes": [1, 2, 4, 8, 16],
               "context": 128, "repeats": 9, "requests": 60, "prompt_tokens": 32,
               "output_tokens": 8},
    "gpu": {"model": "gpu", "train_batch_size": 16, "batch_sizes": [1, 4, 16, 64, 256],
            "context": 1024, "repeats": 20, "requests": 200, "prompt_tokens": 512,
            "output_tokens": 32, "dtype": "bfloat16"},
}  # fmt: skip
OVERHEAD = 20  # % of the roofline below which starting the kernels takes most of the time


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(seed=args.seed, device=args.device) as job,
    ):
        model = model_from_args(args, job.device, getattr(torch, args.dtype))
        compare_phases(run, model, args)
        compare_loads(run, model, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    phases = parser.add_argument_group("training, prefill, decode")
    phases.add_argument("--batch-sizes", type=script.positive_int, nargs="+", metavar="B")
    phases.add_argument("--train-batch-size", type=script.positive_int, metavar="B")
    phases.add_argument("--context", type=script.positive_int, help="tokens in a sequence")
    phases.add_argument("--repeats", type=script.positive_int, help="timed runs of each")
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--loads", type=script.fraction, nargs="+", metavar="LOAD", default=[0.3, 0.7, 0.95],
        help="arrivals / capacity",
    )  # fmt: skip
    serving.add_argument("--requests", type=script.positive_int, help="requests at each load")
    serving.add_argument("--prompt-tokens", type=script.positive_int)
    serving.add_argument("--output-tokens", type=script.positive_int)
    serving.add_argument("--max-batch", type=script.positive_int, default=8)
    execution = parser.add_argument_group("execution")
    execution.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    execution.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    execution.add_argument("--seed", type=script.seed, default=0)
    args = parser.parse_args(argv)
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    if bad := [load for load in args.loads if not 0 < load < 1]:
        raise UsageError(f"--loads {bad[0]:g} has no steady state; use loads between 0 and 1")
    if len(set(args.loads)) < 2:
        raise UsageError(f"--loads {args.loads[0]:g} is one load; use two or more to compare")
    args.loads, args.batch_sizes = sorted(set(args.loads)), sorted(set(args.batch_sizes))
    config_from_args(args)  # a wrong shape is told before anything starts
    return args


def compare_phases(run: Run, model: Llama, args: Namespace) -> None:
    """Measure training, prefill and decode beside the roofline of this machine."""
    weight = model.lm_head.weight
    peak = hardware.peak_flops(weight.device, weight.dtype)
    peak = peak or hardware.measured_peak_flops(weight.device, weight.dtype)
    bandwidth = hardware.memory_bandwidth(weight.device)
    bandwidth = bandwidth or hardware.measured_bandwidth(weight.device)
    run.metric("peak_of_matrix_products", peak, "FLOP/s")
    run.metric("memory_bandwidth", bandwidth, "B/s")
    run.metric("machine_balance", peak / bandwidth, "FLOP per byte")

    training = training_step(model, args.train_batch_size, args.context)
    reading = prefill(model, 1, args.context)
    writing = [decode(model, batch, args.context) for batch in args.batch_sizes]
    workloads = [training, reading, *writing]
    timings = measure.compare(
        {f"{w.name} {w.batch}": w.run for w in workloads}, 2, args.repeats, weight.device
    )
    rows: list[list[Any]] = []
    seconds = [timing.median for timing in timings.values()]
    for work, taken in zip(workloads, seconds, strict=True):
        bound = predict.roofline_seconds(work.flops, work.bytes_moved, peak, bandwidth)
        rows.append([
            work.name, work.batch, work.intensity, work.intensity * bandwidth / peak,
            1e3 * bound, 1e3 * taken, work.tokens / taken, 100 * bound / taken,
        ])  # fmt: skip
    run.table(
        "phases",
        ["workload", "batch", "FLOPs/byte", "times the balance", "roofline ms", "measured ms",
         "tokens/s",
         "% of roofline"],
        rows,
        caption=f"One run of each at {args.context} tokens of context",
    )  # fmt: skip
    limited: dict[str, list[str]] = {}
    for name, batch, _, *other in rows:
        limited.setdefault(limit(*other), []).append(f"{name} of {batch}")
    limits = [f"limited by {what}: {', '.join(names)}" for what, names in limited.items()]
    run.print(f"verdict: {'; '.join(limits)}")
    draw_roofline(run, workloads, seconds, peak, bandwidth)

    run.check_above(
        "prefill does more FLOPs per byte than decode", reading.intensity, writing[0].intensity
    )
    one, most = writing[0], writing[-1]
    ratios = timings[f"decode {one.batch}"].ratios(timings[f"decode {most.batch}"])
    gains = [most.tokens / one.tokens * ratio for ratio in ratios]
    run.check_within(
        "decoding a batch gives more tokens/s than one", gains, at_least=1.0, unit="times"
    )


def limit(balance: float, *times: float) -> str:
    """What a row of the table is limited by; `times` end with its % of the roofline."""
    if times[-1] < OVERHEAD:
        return "overhead"
    return "compute" if balance > 1 else "memory"


def compare_loads(run: Run, model: Llama, args: Namespace, job: runtime.Runtime) -> None:
    """Serve random arrivals at each load, and compare the mean wait with what was to be expected.

    Predicted is the wait of these very arrivals, if each answer took its usual time. The table has
    theory's mean beside it, of an endless queue: near a load of 1 a hundred requests stay below it.
    """

    def answer(batch: int) -> float:
        """Seconds to answer `batch` requests together."""
        prompts = random_tokens(model, batch, args.prompt_tokens)
        started = time.perf_counter()
        model.generate(prompts, args.output_tokens)
        job.synchronize()
        return time.perf_counter() - started

    for batch in range(1, args.max_batch + 1):
        answer(batch)
    usual = float(np.mean([answer(1) for _ in range(max(20, args.requests // 3))]))
    capacity = 1 / usual
    run.metric("capacity", capacity, "requests/s", "one request at a time")

    patterns = [poisson_arrivals(load * capacity, args.requests, args.seed) for load in args.loads]
    servers = [Server(arrivals, max_batch=1) for arrivals in patterns]
    batching = Server(patterns[-1], args.max_batch)
    for _ in run.progress(range(args.requests), "serving"):
        for server in [*servers, batching]:  # in turns: the machine's speed drifts for all alike
            if not server.done:
                server.serve_next(answer)

    for load, server in zip(args.loads, servers, strict=True):
        predicted = waits(server.arrivals, usual).mean()
        run.compare(f"mean wait at load {load:g}", predicted, server.wait.mean(), "s")
    run.table(
        "serving",
        ["load", "batch up to", "requests/s", "waited %", "mean wait ms", "endless queue ms",
         "p50 latency ms", "p99 latency ms"],
        [*([load, 1, *server.summary(endless_wait(server, load))]
           for load, server in zip(args.loads, servers, strict=True)),
         [args.loads[-1], batching.max_batch, *batching.summary(None)]],
        caption=f"{args.requests} requests at each load; the last row batches those that wait",
    )  # fmt: skip
    draw_queue(run, args.loads, servers)
    waited = [100 * server.waited for server in servers]
    run.check_above("more requests wait at the highest load", waited[-1], waited[0], "%")


def draw_queue(run: Run, loads: list[float], servers: list[Server]) -> None:
    """The knee: the mean latency that theory gives an endless queue, and what was measured."""
    services = np.concatenate([server.services for server in servers])
    curve = np.linspace(0.02, 0.97, 64)
    predicted = [services.mean() + mean_wait(load / services.mean(), services) for load in curve]
    series = [
        {"label": "mean of an endless queue (M/G/1)", "x": curve.tolist(), "y": predicted},
        {"label": "mean, measured", "x": loads, "y": [s.latency.mean() for s in servers]},
        {"label": "99th percentile, measured", "x": loads,
         "y": [np.percentile(s.latency, 99) for s in servers]},
    ]  # fmt: skip
    run.figure(
        "workloads_queue", kind="line", log_y=True, series=series,
        title="Latency has a knee: it is waiting, not work",
        x_label="load (arrivals / capacity)", y_label="latency (s)",
    )  # fmt: skip


def draw_roofline(
    run: Run, workloads: list[Workload], seconds: list[float], peak: float, bandwidth: float
) -> None:
    intensities = [work.intensity for work in workloads]
    first, last = np.log2([min(intensities) / 2, 2 * max(*intensities, peak / bandwidth)])
    x = np.logspace(first, last, 64, base=2)
    series = [{"label": "roofline", "x": x.tolist(), "y": np.minimum(peak, x * bandwidth).tolist()}]
    for name in dict.fromkeys(work.name for work in workloads):
        points = [(w.intensity, w.flops / t) for w, t in zip(workloads, seconds, strict=True)
                  if w.name == name]  # fmt: skip
        series.append({"label": name, "x": [p[0] for p in points], "y": [p[1] for p in points]})
    run.figure(
        "workloads_roofline", kind="line", log_x=True, log_y=True, series=series,
        title="Decode is far below what the machine can compute",
        x_label="arithmetic intensity (FLOPs per byte)", y_label="speed (FLOP/s)",
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
