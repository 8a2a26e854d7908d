"""What the engine's operators on a CPU reach of this machine's limits, beside torch's.

A product of m rows with a weight of P numbers reads P · bytes and does 2 · m · P FLOPs. It cannot
take less time than the reading at the memory's bandwidth, nor than the arithmetic at the
processor's peak. With one row the first is the limit, with 64 the second; between them a good
product does both at once. The weights here are those of a model's layers, one after the other and
more than any cache holds, as in decoding. The ways to multiply are torch's product, oneDNN's with
a packed weight (torch's own preparation for inference), and `paged_engine.kernels`.

A decode step is then a sum: all layers' weights, the head's, and the cache of every sequence.

Run:
    python chapter06-vllm/code/benchmark_kernels.py --figures build/figures
    python chapter06-vllm/code/benchmark_kernels.py --model laptop --rows 1 16 256 --context 512

You should see: with a bfloat16 weight one row takes little more than half the time of float32, for
half the bytes.
From some tens of rows on the type of the weight makes no difference to the compiled operators, for
the arithmetic is float32's; a processor without instructions for bfloat16 makes it a great one to
torch's. With such instructions torch's are faster at many rows, perhaps than float32's limit: they
round to bfloat16 what they multiply, which the engine does not. The engine's results are exact to
float32 on every processor, and a row's result is the same bits in every batch.

Source of the bounds: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distlab import hardware, measure, predict, script
from distlab.catalog import MODELS
from distlab.model import SIZES
from distlab.predict import Architecture
from distlab.script import Run, Skipped, UsageError
from inference.engine_parts import Step, random_weight, weight_shapes
from paged_engine import kernels

CPU = torch.device("cpu")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {"float32": "fp32", "bfloat16": "bf16"}  # as the formulas call them
SHAPES: dict[str, Architecture] = {
    "smollm2-135m": MODELS["smollm2-135m"].architecture,
    **{name: SIZES[name].architecture for name in ("laptop", "smoke")},
}
PRESETS = {
    "smoke": {"model": "smoke", "rows": [1, 8], "context": 40, "memory_mib": 4, "repeats": 3},
    "laptop": {"model": "smollm2-135m", "rows": [1, 8, 64], "context": 100, "repeats": 7},
    "gpu": {"model": "smollm2-135m", "rows": [1, 8, 64, 256], "context": 100, "repeats": 7},
}
TOLERANCE = 1e-5  # float32's, of sums of some hundred products


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    built, words = kernels.native()
    if built is None:
        raise Skipped(f"nothing to compare with torch's operators: {words}")
    shape = SHAPES[args.model]
    with script.run(args) as run:
        run.print(f"machine: {torch.get_num_threads()} threads, {kernels.describe()}")
        check_results(run, shape)
        points = [
            point
            for name in run.progress(args.dtypes, "types")
            for point in measure_products(shape, name, args)
        ]
        limits = show_limits(run, points)
        show_products(run, points, limits)
        for name in run.progress(args.dtypes, "steps"):
            measure_steps(run, shape, name, limits, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--model", choices=sorted(SHAPES), help="whose shapes, random weights")
    parser.add_argument("--dtypes", choices=sorted(TYPES), nargs="+", default=list(TYPES))
    parser.add_argument("--rows", **positive, nargs="+", metavar="M", help="sequences in a step")
    parser.add_argument("--context", **positive, help="tokens that each sequence holds")
    parser.add_argument("--memory-mib", **positive, help="of the weights that the products go "
                        "through (default: 4 last caches)")  # fmt: skip
    parser.add_argument("--repeats", **positive, help="timed runs of each way, in turns")
    args = parser.parse_args(argv)
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    for name in ("rows", "dtypes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


@dataclass(frozen=True)
class Point:
    """One way to do the layers' products, timed in turns with the others and with the limits."""

    way: str
    dtype: str
    rows: int
    flops: float
    bytes_read: float
    seconds: float

    def bound(self, limits: "Limits") -> float:
        """Seconds that it takes at least."""
        return predict.roofline_seconds(self.flops, self.bytes_read, limits.peak, limits.bandwidth)


@dataclass(frozen=True)
class Limits:
    peak: float  # FLOP/s, float32
    bandwidth: float  # bytes/s, read


def measure_products(shape: Architecture, dtype: str, args: Namespace) -> list[Point]:
    """Every way over every number of rows, and the two limits as points of their own."""
    memory = args.memory_mib * 2**20 if args.memory_mib else hardware.beyond_cache_bytes(CPU)
    numbers = sum(out * depth for out, depth in weight_shapes(shape))
    count = max(1, memory // (numbers * TYPES[dtype].itemsize))
    weights = [
        random_weight(*size, TYPES[dtype]) for _ in range(count) for size in weight_shapes(shape)
    ]
    ways = prepare_ways(weights, dtype)
    long, square = torch.ones(memory // 4), torch.randn(512, 512)
    points = []
    for rows in args.rows:
        x = {depth: torch.randn(rows, depth) for _, depth in weight_shapes(shape)}
        calls: dict[str, Callable[[], object]] = {
            way: partial(multiply, x) for way, multiply in ways.items()
        }
        calls["reading"] = long.sum
        calls["square product"] = lambda: [square @ square for _ in range(4)]
        timings = measure.compare(calls, 1, args.repeats)
        flops, read = 2.0 * rows * numbers * count, numbers * count * TYPES[dtype].itemsize
        work = {"reading": (0.0, 4.0 * len(long)), "square product": (4 * 2.0 * 512**3, 0.0)}
        for way, timing in timings.items():
            done, moved = work.get(way, (flops, float(read)))
            seconds = min(timing.samples) if way in work else timing.median
            points.append(Point(way, dtype, rows, done, moved, seconds))
    return points


def prepare_ways(weights: list[torch.Tensor], dtype: str) -> dict[str, Callable[[dict], object]]:
    """From the input of each depth to all products: torch's, oneDNN's where it can, and ours.

    Ours takes float32 rows beside any weight; torch wants them in the weight's type.
    """
    packed = [kernels.pack(weight) for weight in weights]
    depths = [weight.shape[1] for weight in weights]

    def by_torch(x: dict) -> object:
        narrow = {depth: rows.to(TYPES[dtype]) for depth, rows in x.items()}
        return [F.linear(narrow[w.shape[1]], w) for w in weights]

    ways: dict[str, Callable[[dict], object]] = {
        "torch": by_torch,
        "compiled": lambda x: [p(x[d]) for p, d in zip(packed, depths, strict=True)],
    }
    if onednn_takes(dtype):
        prepared = [by_onednn(weight) for weight in weights]
        ways["oneDNN packed"] = lambda x: [p(x[d]) for p, d in zip(prepared, depths, strict=True)]
    return ways


def onednn_takes(dtype: str) -> bool:
    """Whether it multiplies this type here, by torch's own word."""
    there = torch.backends.mkldnn.is_available()
    return there and (dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def by_onednn(weight: torch.Tensor) -> kernels.Product:
    """The product with a weight that oneDNN has packed; rows are rounded to the weight's type."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(weight.dtype)
        y = torch.ops.mkldnn._linear_pointwise(narrow, packed, None, "none", [], "")
        return y.to(x.dtype)

    return product


def show_limits(run: Run, points: list[Point]) -> Limits:
    """The best that anything did in this run: interference only ever adds time.

    The peak is float32's, in which the engine computes; instructions for bfloat16 may exceed it.
    """
    float32 = [p for p in points if p.dtype == "float32" or p.way not in ("torch", "oneDNN packed")]
    limits = Limits(
        peak=max(p.flops / p.seconds for p in float32),
        bandwidth=max(p.bytes_read / p.seconds for p in points),
    )
    run.metric("read_bandwidth", limits.bandwidth, "B/s", "the best of the run")
    run.metric("float32_peak", limits.peak, "FLOP/s", "the best of the run")
    return limits


def show_products(run: Run, points: list[Point], limits: Limits) -> None:
    products = [p for p in points if p.way not in ("reading", "square product")]
    torchs = {(p.dtype, p.rows): p.seconds for p in products if p.way == "torch"}
    run.table(
        "products",
        ["way", "weights", "rows", "GB/s", "GFLOP/s", "% of limit", "times torch's speed"],
        [[p.way, p.dtype, p.rows, p.bytes_read / p.seconds / 1e9, p.flops / p.seconds / 1e9,
          100 * p.bound(limits) / p.seconds, torchs[p.dtype, p.rows] / p.seconds]
         for p in products],
        caption="The limit: bytes over bandwidth or FLOPs over peak, whichever takes longer",
    )  # fmt: skip
    series = [
        {"label": f"{way}, {dtype}", "x": [p.rows for p in some],
         "y": [p.flops / p.seconds for p in some]}
        for way, dtype in dict.fromkeys((p.way, p.dtype) for p in products)
        if (some := [p for p in products if (p.way, p.dtype) == (way, dtype)])
    ]  # fmt: skip
    run.figure(
        "kernels", kind="line", log_x=True, log_y=True, series=series,
        title="Products with a model's weights on this CPU",
        x_label="rows (sequences in a decode step)", y_label="speed (FLOP/s)",
    )  # fmt: skip


def measure_steps(
    run: Run, shape: Architecture, dtype: str, limits: Limits, args: Namespace
) -> None:
    """Tokens per second of whole decode steps: bytes and FLOPs over the limits, then measured."""
    step, size = Step(shape, TYPES[dtype]), TYPES[dtype].itemsize
    numbers = predict.matmul_parameters(shape)
    for rows in args.rows:
        step.prepare(rows, args.context)
        held = rows * args.context * predict.kv_bytes_per_token(shape, KINDS[dtype])
        bound = predict.roofline_seconds(
            2.0 * rows * numbers, numbers * size + held, limits.peak, limits.bandwidth
        )
        seconds = measure.measure(step, 1, args.repeats).median
        run.compare(f"{dtype}, {rows} in a step", rows / bound, rows / seconds, "tok/s")


def check_results(run: Run, shape: Architecture) -> None:
    torch.manual_seed(0)
    for name, dtype in TYPES.items():
        weight = random_weight(*weight_shapes(shape)[-1], dtype)
        x, product = torch.randn(70, weight.shape[1]), kernels.pack(weight)
        exact = x.double() @ weight.double().T
        run.check_close(
            f"{name}: the compiled product is exact to float32", product(x).double(), exact,
            tolerance=TOLERANCE,
        )  # fmt: skip
        alone = torch.cat([product(row[None]) for row in x])
        different = int((alone != product(x)).sum())
        run.check_equal(f"{name}: numbers that differ alone and among 70 rows", different, 0)


if __name__ == "__main__":
    script.exit(main)
