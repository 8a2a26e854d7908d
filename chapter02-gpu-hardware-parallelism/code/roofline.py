"""The roofline of this machine, measured, and where matrix products and other kernels stand on it.

A kernel that does F FLOPs and moves B bytes takes at least max(F / peak, B / bandwidth). So at an
arithmetic intensity of F / B FLOPs per byte no kernel does more than min(peak, F / B · bandwidth)
FLOP/s: a slope, and a flat roof from the ridge point peak / bandwidth on. Left of the ridge a
faster processor would not help, only fewer bytes. The roof is measured, not read off a data sheet:
the best of products of square matrices, for each type, and of streams through memory.

Run:
    python chapter02-gpu-hardware-parallelism/code/roofline.py --figures build/figures
    python chapter02-gpu-hardware-parallelism/code/roofline.py --dtypes float32 --rows 1 8 64 512

You should see: a product with few rows, as in decoding, stands on the slope, since it reads a whole
weight for little work; with more rows it climbs to the flat roof. Element-wise kernels stay on the
slope whatever their size, and small calls stay far below it: starting them takes longer. Fused, a
chain of two does the same work for two thirds of the bytes. A CPU without instructions for bfloat16
has a far lower roof for it.

Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial

import torch

from distlab import hardware, measure, predict, script
from distlab.measure import Timing
from distlab.script import Run, UsageError
from parallelism.roofline import (
    ELEMENTWISE,
    FUSED,
    ROOFS,
    UNFUSED,
    Kernel,
    Point,
    Roof,
    counted,
    draw,
    elementwise,
    product,
    random_weights,
    show_points,
    show_roofs,
    square,
)

TYPES = ("float32", "float64", "bfloat16", "float16")
PRESETS = {  # so short a run as smoke's, maybe on a busy machine, judges no time
    "smoke": {"dtypes": ["float32", "float64", "bfloat16"], "rows": [1, 8, 64], "width": 512,
              "pieces": [2**14, 2**20], "seconds": 0.01, "repeats": 3, "memory_mib": 32},
    "laptop": {"dtypes": ["float32", "float64", "bfloat16"], "rows": [1, 4, 16, 64, 256, 1024],
               "width": 1024, "pieces": [2**12, 2**16, 2**20, 2**24], "seconds": 0.04,
               "repeats": 12, "tolerance": 1.25},
    "gpu": {"dtypes": ["float32", "bfloat16", "float16", "float64"],
            "rows": [1, 16, 64, 256, 1024, 4096, 8192], "width": 8192,
            "pieces": [2**16, 2**20, 2**24, 2**27], "seconds": 0.2, "repeats": 12,
            "tolerance": 1.25},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device)
    with script.run(args) as run:
        measured = [
            measure_dtype(run, getattr(torch, name), device, args)
            for name in run.progress(args.dtypes, "dtypes")
        ]
        bandwidth = max(hardware.measured_bandwidth(device), *(m.bandwidth for m in measured))
        roofs, points = [], []
        for one in measured:
            roofs.append(
                Roof(one.dtype, one.peak, bandwidth, hardware.peak_flops(device, one.dtype),
                     hardware.memory_bandwidth(device))
            )  # fmt: skip
            points += [Point(kernel, timing, roofs[-1]) for kernel, timing in one.times]
        show_roofs(run, roofs)
        show_points(run, points)
        draw(run, roofs, points)
        compare_fusion(run, points)
        check_points(run, points, args.tolerance)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--dtypes", choices=TYPES, nargs="+")
    number = partial(parser.add_argument, type=script.positive_int)
    number("--rows", nargs="+", metavar="M", help="of the products")
    number("--width", help="of the weights, square")
    number("--pieces", nargs="+", metavar="N", help="elements a call")
    number("--memory-mib", help="of a kernel's operands (default: 4 last "
                        "caches)")  # fmt: skip
    parser.add_argument("--seconds", type=script.positive_float, help="a run's, at most (about)")
    number("--repeats", help="timed runs of each kernel")
    parser.add_argument("--tolerance", type=script.positive_float, metavar="X", help="how far a "
                        "kernel's median may be above the roof's best, as a factor")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args(argv)
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    args.device = hardware.chosen_device(args.device)
    for name in ("dtypes", "rows", "pieces"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


@dataclass(frozen=True)
class Measured:
    """One type's best rates, in FLOP/s and bytes/s, and its kernels' times."""

    dtype: torch.dtype
    peak: float
    bandwidth: float
    times: list[tuple[Kernel, Timing]]


def measure_dtype(run: Run, dtype: torch.dtype, device: torch.device, args: Namespace) -> Measured:
    """The kernels of one type and what its roofs are made of, in turns: they drift together."""
    peak = hardware.measured_peak_flops(device, dtype, 10 * args.seconds)
    kernels = make_kernels(dtype, device, args, peak)
    check_counts(run, dtype, kernels)
    timings = measure.compare(
        {str(i): kernel.run for i, kernel in enumerate(kernels)}, 1, args.repeats, device
    )
    taken = [(kernel, timings[str(i)]) for i, kernel in enumerate(kernels)]
    best = {  # interference only ever adds time
        what: max(rate(kernel) / min(timing.samples) for kernel, timing in taken if of(kernel))
        for what, of, rate in (
            ("peak", lambda k: k.name == "square", lambda k: k.flops),
            ("bandwidth", lambda k: k.name in ROOFS, lambda k: k.bytes_moved),
        )
    }
    times = [(kernel, timing) for kernel, timing in taken if kernel.name != "square"]
    return Measured(dtype, max(peak, best["peak"]), best["bandwidth"], times)


def make_kernels(
    dtype: torch.dtype, device: torch.device, args: Namespace, peak: float
) -> list[Kernel]:
    """Products over the rows, and every element-wise kernel over the sizes of a call.

    Rows whose single product takes longer than --seconds at the measured peak are left out.
    """
    memory = args.memory_mib * 2**20 if args.memory_mib else hardware.beyond_cache_bytes(device)
    most = args.seconds * peak
    weights = random_weights(args.width, memory, dtype, device)
    kernels = [
        product(rows, weights, most)
        for rows in args.rows
        if 2 * rows * args.width**2 <= most or rows == min(args.rows)
    ]
    side = next((n for n in (2048, 1024, 512) if 2 * n**3 <= most), 256)
    kernels.append(square(side, dtype, device))
    count = memory // 3 // dtype.itemsize
    arrays = [torch.ones(count, dtype=dtype, device=device) for _ in range(3)]
    pieces = sorted({min(piece, count) for piece in args.pieces})
    for name in ELEMENTWISE:
        whole = name in (FUSED, UNFUSED)  # in pieces the cache would hold what goes between the two
        kernels += [elementwise(name, arrays, n) for n in ([count] if whole else pieces)]
    return kernels


def check_counts(run: Run, dtype: torch.dtype, kernels: list[Kernel]) -> None:
    """Formulas against what torch's operators were seen to do."""
    seen = [counted(kernel) for kernel in kernels]
    name = str(dtype).removeprefix("torch.")
    run.check_equal(
        f"{name}: bytes by the formulas are those of the operators' tensors",
        [moved for _, moved in seen],
        [int(kernel.bytes_moved) for kernel in kernels],
    )
    run.check_equal(
        f"{name}: FLOPs of the products are those that torch counts",
        [flops for flops, _ in seen],
        [int(kernel.flops) if kernel.is_product else 0 for kernel in kernels],
    )


def compare_fusion(run: Run, points: list[Point]) -> None:
    """The same chain in one kernel and in two, of the first type."""
    fused, unfused = (next(p for p in points if p.kernel.name == n) for n in (FUSED, UNFUSED))
    check_fusion(run)
    run.compare(
        "speed-up by fusion (bytes unfused / fused)",
        unfused.kernel.bytes_moved / fused.kernel.bytes_moved,
        unfused.seconds / fused.seconds,
    )
    kernel, roof = fused.kernel, fused.roof
    bound = predict.roofline_seconds(kernel.flops, kernel.bytes_moved, roof.peak, roof.bandwidth)
    run.compare("time of the fused chain, from the roofline", bound, fused.seconds, "s")


def check_fusion(run: Run) -> None:
    results = []
    for name in (FUSED, UNFUSED):
        generator = torch.Generator().manual_seed(0)
        a, b, c = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(3))
        ELEMENTWISE[name][0](a, b, c)
        results.append(a)
    fused, unfused = results
    run.check_close("the chain gives the same in one kernel and in two", fused, unfused, 1e-12)


def check_points(run: Run, points: list[Point], tolerance: float | None) -> None:
    if tolerance is not None:
        shares = {f"number {i}, {p.kernel.name}": p.shares for i, p in enumerate(points)}
        run.check_within(
            "no kernel is above its roof", shares, tolerance, unit="of the roof", any_size=True
        )
    vector = [p for p in points if not p.kernel.is_product and p.kernel.dtype is torch.float32]
    if vector:
        run.check_below(
            "float32 element-wise kernels are left of the ridge, on the memory side",
            max(point.kernel.intensity for point in vector),
            vector[0].roof.ridge,
            "FLOP per byte",
        )


if __name__ == "__main__":
    script.exit(main)
