"""A decode step of the whole engine against the memory's bandwidth: what its machinery costs.

A step reads all weights once and each sequence's keys and values; it takes at least those bytes
over the bandwidth of reading, or the FLOPs over the peak where the batch is large. Here the engine
itself decodes, with scheduler, sampler and block tables, a model of random weights in a shape of
your choice: what it reaches of that bound is what its kernels, their launches and its Python leave.
On a GPU decode runs as a CUDA graph. The last table is torch's profiler on some steps: which
operators take the time, and what is left for all that torch does not see, such as compiled
operators of the engine's own.

Run:
    python chapter06-vllm/code/decode_roofline.py
    python chapter06-vllm/code/decode_roofline.py --hidden 1024 --layers 12 --batches 1 2 4
    python chapter06-vllm/code/decode_roofline.py --preset gpu --trace build/decode.json

You should see: a share of the bound that is highest where the step is long, and tokens per second
that grow nearly with the batch while it is bound by the memory. --trace writes the profile for
https://ui.perfetto.dev. With --preset gpu the shape is that of Llama 3.2 1B.

Source: Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102), section 2.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distlab import files, hardware, script
from distlab.errors import UsageError
from distlab.measure import Timing, measure
from distlab.model import Llama, ModelConfig, num_parameters, save
from distlab.run import Run
from inference.roofline import Roofline, decode_bytes, measured_roofline
from paged_engine import SamplingParams
from paged_engine.engine import Engine, EngineConfig

PRESETS = {
    "smoke": {"hidden": 128, "inner": 352, "layers": 2, "vocab_size": 512, "dtype": "float32",
              "batches": [1, 4], "context": 24, "steps": 6, "tolerance": 10.0},
    "laptop": {"hidden": 768, "inner": 2048, "layers": 8, "vocab_size": 8192, "dtype": "float32",
               "batches": [1, 2, 4, 8, 16], "context": 128, "steps": 24, "tolerance": 1.25},
    "gpu": {"hidden": 2048, "inner": 8192, "layers": 16, "vocab_size": 128_256,
            "dtype": "bfloat16", "batches": [1, 4, 16, 64], "context": 512, "steps": 64,
            "tolerance": 1.25},
}  # fmt: skip
HEAD_DIM, GROUP = 64, 4  # query heads that share a key-value head
BLOCK_SIZE = 16
WARMUP = 3
PROFILED, SHOWN = 8, 8  # steps, and operators of them


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = model_config(args)
    with script.run(args) as run, tempfile.TemporaryDirectory() as folder:
        run.metric("parameters", make_model(config, args, Path(folder) / "model"), "params")
        limit = measured_roofline(args.dtype)
        run.metric("read_bandwidth", limit.bandwidth, "B/s")
        run.metric("matmul_peak", limit.peak_flops, "FLOP/s")
        with Engine(engine_config(Path(folder) / "model", args)) as engine:
            run.print(f"job: {engine.runner.description}")
            timings = {batch: decode(run, engine, batch, args) for batch in args.batches}
            show(run, config, limit, timings, args)
            profile(run, engine, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--hidden", **positive, help="hidden size, a multiple of 64")
    parser.add_argument("--inner", **positive, help="width of the MLP")
    parser.add_argument("--layers", **positive)
    parser.add_argument("--vocab-size", **positive)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--batches", **positive, nargs="+", metavar="B", help="sequences in a step")
    parser.add_argument("--context", **positive, help="tokens of each sequence before the steps")
    parser.add_argument("--steps", **positive, help="timed, of each batch")
    parser.add_argument("--tolerance", type=script.positive_float, metavar="X", help="how far a "
                        "step may be below its bound, as a factor")  # fmt: skip
    parser.add_argument("--trace", metavar="FILE", help="write the profiled steps as a trace")
    args = parser.parse_args(argv)
    if args.hidden % HEAD_DIM:
        raise UsageError(f"--hidden {args.hidden} is no multiple of {HEAD_DIM}; use 256 or 768")
    if args.steps < 3:
        raise UsageError(f"--steps {args.steps} gives no median; use at least 3")
    if args.trace is not None:
        files.refuse_unwritable_file("--trace", args.trace)
    args.batches = sorted(set(args.batches))
    # While the last prompts are computed, each a step at most, the first ones decode already.
    args.longest = args.context + max(args.batches) + WARMUP + args.steps + PROFILED + 1
    return args


def model_config(args: Namespace) -> ModelConfig:
    """Heads of 64, up to four query heads to a key-value head, as in Llama 3.2."""
    heads = args.hidden // HEAD_DIM
    kv_heads = heads // GROUP if heads % GROUP == 0 else heads
    return ModelConfig(
        args.vocab_size, args.hidden, args.inner, args.layers, heads, kv_heads,
        max_position_embeddings=args.longest,
    )  # fmt: skip


def make_model(config: ModelConfig, args: Namespace, folder: Path) -> int:
    """Save random weights in a Hugging Face folder; gives their number."""
    torch.manual_seed(0)
    with torch.device(hardware.default_device()):
        model = Llama(config)
    save(model.to(getattr(torch, args.dtype)), folder)
    return num_parameters(model)


def engine_config(model: Path, args: Namespace) -> EngineConfig:
    """Room for the largest batch; no prefix is found, so that every sequence has its own cache."""
    blocks = max(args.batches) * (args.longest // BLOCK_SIZE + 1)
    return EngineConfig(
        model, dtype=args.dtype, block_size=BLOCK_SIZE, num_blocks=blocks,
        max_sequences=max(args.batches), prefix_caching=False,
    )  # fmt: skip


def decode(run: Run, engine: Engine, batch: int, args: Namespace) -> Timing:
    """Seconds of a step of `batch` sequences; all of them decode in every step."""
    tokens: list[int] = []  # of each step
    with decoding(engine, batch, args):
        timing = measure(lambda: tokens.append(len(engine.step())), WARMUP, args.steps)
    timed = sum(tokens[WARMUP:])
    run.check_equal(f"tokens of {args.steps} steps of {batch}", timed, args.steps * batch)
    return timing


@contextmanager
def decoding(engine: Engine, batch: int, args: Namespace) -> Iterator[None]:
    """`batch` requests whose prompts are computed, so that each step brings each a token."""
    draw = torch.Generator().manual_seed(batch)
    params = SamplingParams(temperature=0.0, max_tokens=args.longest, ignore_eos=True)
    prompts = torch.randint(args.vocab_size, [batch, args.context], generator=draw).tolist()
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in engine.step()}
    yield
    for request in requests:
        engine.cancel(request)


def show(
    run: Run, config: ModelConfig, limit: Roofline, timings: dict[int, Timing], args: Namespace
) -> None:
    """Bound and measurement of each batch, as a table and a figure; a bound is one."""
    medians = {batch: timing.median for batch, timing in timings.items()}
    context = args.context + WARMUP + args.steps / 2
    bounds = {b: limit.decode_seconds(config, args.dtype, b, context) for b in medians}
    for batch, bound in bounds.items():
        run.compare(f"decode step of {batch}", 1e3 * bound, 1e3 * medians[batch], "ms")
    run.table(
        "decode",
        ["sequences", "bound, ms", "measured, ms", "% of bound", "GB/s", "tok/s"],
        [[batch, 1e3 * bound, 1e3 * medians[batch], 100 * bound / medians[batch],
          decode_bytes(config, args.dtype, batch, context) / medians[batch] / 1e9,
          batch / medians[batch]] for batch, bound in bounds.items()],
        caption=f"Steps of the engine at a context of {context:.0f} tokens",
    )  # fmt: skip
    rates = {"bound": bounds, "the engine": medians}
    run.figure(
        "decode_rate", kind="line", log_x=True, log_y=True,
        series=[{"label": name, "x": list(some), "y": [b / s for b, s in some.items()]}
                for name, some in rates.items()],
        title="Decode: what the memory allows, and what the engine does",
        x_label="sequences in a step", y_label="tokens/s",
    )  # fmt: skip
    best = max(bound / medians[batch] for batch, bound in bounds.items())
    run.metric("best_share_of_bound", best)
    shares = {
        f"a batch of {batch}": [bound / taken for taken in timings[batch].samples]
        for batch, bound in bounds.items()
    }
    run.check_within(
        "no step is faster than its bound", shares, args.tolerance, unit="of the bound",
        more="--steps",
    )  # fmt: skip


def profile(run: Run, engine: Engine, args: Namespace) -> None:
    """The operators of some steps of the largest batch, and the time that none of them has."""
    on_gpu = hardware.has_cuda()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with (
        decoding(engine, max(args.batches), args),
        torch.profiler.profile(activities=kinds) as profiler,
    ):
        started = time.perf_counter()
        for _ in range(PROFILED):
            engine.step()
        wall = 1e6 * (time.perf_counter() - started)  # µs, as the profiler counts
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    seen = [(event.key, event.count, getattr(event, name)) for event in profiler.key_averages()]
    seen.sort(key=lambda one: -one[2])
    rows = [[key[:60], count / PROFILED, time_us / PROFILED / 1e3, 100 * time_us / wall]
            for key, count, time_us in seen[:SHOWN]]  # fmt: skip
    rest = wall - sum(one[2] for one in seen)
    rows.append(
        ["(idle)" if on_gpu else "(not torch's)", None, rest / PROFILED / 1e3, 100 * rest / wall]
    )
    where = "the GPU" if on_gpu else "the processor"
    run.table(
        "operators",
        ["operator", "calls a step", "ms a step", "% of the step"],
        rows,
        caption=f"Steps of {max(args.batches)} sequences, profiled: time on {where}",
    )
    if args.trace:
        with files.atomic_write(args.trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
        run.print(f"trace: {args.trace}")


if __name__ == "__main__":
    script.exit(main)
