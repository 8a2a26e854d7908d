"""How fast bytes move: in the caches, in memory, between host and GPU, and between GPUs.

Most of a model's time goes into moving numbers, and each step away from the core is slower by a
factor. On the CPU: STREAM's four kernels on each number of threads, and a sweep of working sets
from the first cache to beyond the last. With GPUs: host to device and back, pinned and pageable,
within the device, and from each GPU to each other. Beside each stands what the data sheet says, or
unknown. A straight line through the times of the copies, alpha + bytes / bandwidth, predicts one
that it has not seen.

Run:
    python chapter02-gpu-hardware-parallelism/code/bandwidth_test.py --figures build/figures
    python chapter02-gpu-hardware-parallelism/code/bandwidth_test.py --threads 1 2 4
    python chapter02-gpu-hardware-parallelism/code/bandwidth_test.py --specified-memory 204.8

You should see: bandwidth fall by a step where the working set outgrows a cache; two threads add up
in their own caches, and less so in the memory that they share; small copies take the time alpha
whatever their size; and every copy arrives as it was sent.
"""

from argparse import Namespace

import torch

from distlab import hardware, host, script
from distlab.display import quantity
from distlab.script import Run, UsageError
from parallelism.bandwidth import (
    STREAMS,
    Result,
    Transfers,
    compare_with_specification,
    draw_peers,
    draw_sweep,
    draw_transfers,
    fit_line,
    host_routes,
    level_of,
    peer_routes,
    stream,
    sweep,
    transfer,
    working_sets,
)

CPU = torch.device("cpu")
MIB = 2**20
PRESETS = {
    "smoke": {"array_mib": 16, "sweep_step": 4, "traffic_mib": 16, "largest_copy_mib": 4,
              "repeats": 5},
    "laptop": {"sweep_step": 2, "traffic_mib": 256, "largest_copy_mib": 64, "repeats": 9},
    "gpu": {"sweep_step": 2, "traffic_mib": 256, "largest_copy_mib": 256, "repeats": 9},
}  # fmt: skip
SMALLEST_COPY = 2**10
EXACT_ROUNDS = 12  # of STREAM's numbers, which grow by 15 in each: all below 2^53


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device)
    with script.run(args) as run:
        results = [measure_memory(run, args)]
        measure_caches(run, args)
        results += measure_copies(run, device, args)
        if device.type == "cuda":
            results.append(device_memory(device))
            results += measure_peers(run, args)
        compare_with_specification(run, results)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    memory = parser.add_argument_group("memory of the host")
    memory.add_argument(
        "--array-mib", type=script.positive_int, help="each of STREAM's (default: 4 last caches)"
    )
    memory.add_argument(
        "--threads",
        type=script.positive_int,
        nargs="+",
        metavar="N",
        help="default: 1 to all cores",
    )
    memory.add_argument(
        "--specified-memory", type=script.positive_float, metavar="GB/S",
        help="channels x MT/s x 8 bytes / 1000, from the data sheet of this machine's memory",
    )  # fmt: skip
    memory.add_argument("--sweep-step", type=script.positive_int, help="factor between sizes")
    memory.add_argument("--traffic-mib", type=script.positive_int, help="moved for one time")
    copies = parser.add_argument_group("copies")
    copies.add_argument("--largest-copy-mib", type=script.positive_int)
    copies.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=script.positive_int, help="timed runs of each")
    args = parser.parse_args(argv)
    if not 3 <= args.repeats <= EXACT_ROUNDS:
        raise UsageError(
            f"--repeats {args.repeats} is outside 3 to {EXACT_ROUNDS}: fewer give no median, and "
            "more take STREAM's numbers beyond what float64 holds exactly"
        )
    if args.sweep_step < 2:
        raise UsageError("--sweep-step 1 never reaches the next size; use 2 or more")
    cores = host.usable_cores()
    args.threads = sorted(set(args.threads or [*_powers_of_two(cores), cores]))
    if args.threads[-1] > cores:
        raise UsageError(
            f"--threads {args.threads[-1]} is more than the {cores} cores that this process may use"
        )
    args.device = hardware.chosen_device(args.device)
    return args


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def measure_memory(run: Run, args: Namespace) -> Result:
    """STREAM on each number of threads; the best of its kernels is the memory's bandwidth."""
    size = args.array_mib * MIB if args.array_mib else hardware.beyond_cache_bytes(CPU)
    results = [
        stream(size, threads, args.repeats) for threads in run.progress(args.threads, "stream")
    ]
    cache = host.last_level_cache()
    run.table(
        "stream",
        ["threads", *(f"{name} GB/s" for name in STREAMS)],
        [[r.threads, *(r.bandwidth[name] / 1e9 for name in STREAMS)] for r in results],
        caption=f"STREAM: arrays of {quantity(size, 'B')}, "
        f"{quantity(size / cache if cache else None)} times the last-level cache (4 wanted)",
    )
    run.check_equal(
        "STREAM's arrays hold what the same rounds give by hand, exactly",
        [list(r.values) for r in results],
        [list(r.expected) for r in results],
    )
    best = max(max(result.bandwidth.values()) for result in results)
    specified = args.specified_memory * 1e9 if args.specified_memory else None
    return Result("host memory, best of STREAM", best, specified)


def measure_caches(run: Run, args: Namespace) -> None:
    """Bandwidth over working sets: one thread, and all of them with a set of their own each."""
    threads = sorted({1, args.threads[-1]})
    sizes = working_sets(args.sweep_step)
    plan = [(size, count) for size in sizes for count in threads]
    points = [
        sweep(size, count, args.traffic_mib * MIB, args.repeats)
        for size, count in run.progress(plan, "sweep")
    ]
    run.table(
        "sweep",
        ["working set KiB", "threads", "GB/s", "fits in"],
        [[p.working_set // 2**10, p.threads, p.bandwidth / 1e9, level_of(p.working_set * p.threads,
          p.working_set)] for p in points],
        caption="total += row, again and again; the working set of each thread",
    )  # fmt: skip
    draw_sweep(run, points)
    run.check_true(
        "every sum of the sweep is exact", all(p.exact for p in points), f"{len(points)} points"
    )
    alone = [p.samples for p in points if p.threads == 1]
    # Measured one after the other, not in turns: the ratios have the noise of both.
    ratios = [cache / memory for cache, memory in zip(alone[0], alone[-1], strict=True)]
    name = "one core's first cache is faster than memory"
    run.check_within(name, ratios, at_least=1.0, unit="times")


def measure_copies(run: Run, device: torch.device, args: Namespace) -> list[Result]:
    """Each route over sizes; a line through all but one of the times predicts that one."""
    sizes = [SMALLEST_COPY]
    while sizes[-1] < args.largest_copy_mib * MIB:
        sizes.append(sizes[-1] * 4)
    routes = host_routes(device)
    done = [transfer(route, sizes, args.repeats) for route in run.progress(routes, "copies")]
    rows = []
    for copies in done:
        alpha, beta = fit_line(copies.sizes, copies.seconds)
        slope = 1 / beta if beta else None
        rows.append([
            copies.route.name, quantity(alpha, "s"), quantity(slope, "B/s"),
            quantity(alpha * slope if slope else None, "B"), quantity(copies.best, "B/s"),
        ])  # fmt: skip
    run.table(
        "copies",
        ["route", "alpha", "bandwidth (1 / beta)", "alpha x bandwidth", "fastest copy"],
        rows,
        caption="time = alpha + beta x bytes; a copy of alpha x bandwidth bytes is half latency",
    )
    for copies in done:
        predict_one(run, copies)
    draw_transfers(run, done)
    check_arrived(run, done, "every copy arrives as it was sent")
    return [Result(c.route.name, c.best, c.route.specified) for c in done]


def predict_one(run: Run, copies: Transfers) -> None:
    """Leave the size before the last out of the line, and predict it."""
    out = len(copies.sizes) - 2
    seen = [i for i in range(len(copies.sizes)) if i != out]
    alpha, beta = fit_line([copies.sizes[i] for i in seen], [copies.seconds[i] for i in seen])
    size = copies.sizes[out]
    run.compare(
        f"{copies.route.name}, {size / MIB:g} MiB", alpha + beta * size, copies.seconds[out], "s"
    )


def device_memory(device: torch.device) -> Result:
    """A copy within the GPU's memory, reads and writes counted."""
    return Result(
        "device memory, copy",
        hardware.measured_bandwidth(device),
        hardware.memory_bandwidth(device),
    )


def measure_peers(run: Run, args: Namespace) -> list[Result]:
    """From each GPU to each other, one pair at a time."""
    routes = peer_routes()
    if not routes:
        return []
    size = args.largest_copy_mib * MIB
    done = [transfer(route, [size], args.repeats) for route in run.progress(routes, "peers")]
    draw_peers(run, done)
    check_arrived(run, done, "every copy between GPUs arrives as it was sent")
    return [Result(c.route.name, c.best, c.route.specified) for c in done]


def check_arrived(run: Run, done: list[Transfers], name: str) -> None:
    wrong = [f"{copies.route.name} {size} B" for copies in done for size in copies.wrong]
    count = sum(len(copies.sizes) for copies in done)
    run.check_true(name, not wrong, ", ".join(wrong) or f"{count} copies compared")


if __name__ == "__main__":
    script.exit(main)
