"""How many sequences fit beside the weights: the arithmetic of the KV cache, for models and GPUs.

Each token leaves a key and a value in every layer: 2 · layers · key-value heads · head dimension
numbers. Fewer key-value heads than heads (GQA) divide that; latent attention (MLA) stores one
compressed vector and one rotary key instead. What the weights and the engine's room for its largest
batch leave of --utilization of a GPU's memory, divided by that, is the number of tokens; in blocks
of --block-size, of sequences. Tensor
parallelism divides weights and heads over the GPUs, but a key-value head cannot be divided, and the
latent vector belongs to all heads: every GPU keeps its own copy of them.

Run:
    python chapter06-vllm/code/kv_cache_math.py --figures build/figures
    python chapter06-vllm/code/kv_cache_math.py --model llama-3-70b --gpu h100 --gpus 4 \\
        --context 32768 --kv-dtype fp8

You should see: a table of what a token costs and how many sequences fit, on the fewest GPUs that
hold the model; that a model ten times as large need not have a larger cache; and that a small model
really loaded by paged_engine allocates exactly what the formula says.

The room is what vLLM's server keeps by default (`distlab.predict.reserved_activations`). Left out:
CUDA graphs and the driver take their part of what --utilization leaves.
Sources: GQA: Ainslie et al. (arXiv 2305.13245); MLA: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from distlab import predict, script
from distlab.catalog import GPUS, MODELS
from distlab.model import SIZES
from distlab.predict import DTYPE_BYTES, Architecture
from distlab.script import Run, UsageError
from inference.engine_parts import check_cache

NAMED = ["llama-3-8b", "llama-3-70b", "llama-3-405b", "qwen3-8b", "qwen3-32b", "mixtral-8x7b",
         "deepseek-v3"]  # fmt: skip
PRESETS = {
    "smoke": {"model": NAMED, "real_size": "smoke"},
    "laptop": {"model": NAMED, "real_size": "laptop"},
    "gpu": {"model": NAMED, "real_size": "laptop"},
}
PUBLISHED = {"llama-3-405b": 516_096, "deepseek-v3": 70_272}
"""Bytes per token in bf16 as others count them: DeepSeek-AI (arXiv 2505.09343), table 1."""
MOST_GPUS = 1024
CONTEXTS = [1024 * 2**n for n in range(8)]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = [count(args, name) for name in args.model]
    with script.run(args) as run:
        show(run, args, rows)
        check_formula(run, args, rows)
        check_cache(run, args.real_size, args.block_size)
        draw(run, args, rows)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    parser.add_argument("--gpus", **positive, help="tensor parallel over so many (default: the "
                        "fewest that hold the weights and one sequence)")  # fmt: skip
    parser.add_argument("--context", **positive, default=4096, help="tokens of a sequence")
    parser.add_argument("--precision", choices=tuple(DTYPE_BYTES), default="bf16",
                        help="of the weights")  # fmt: skip
    parser.add_argument("--kv-dtype", choices=tuple(DTYPE_BYTES), default="bf16")
    parser.add_argument("--block-size", **positive, default=16)
    parser.add_argument("--utilization", type=script.fraction, default=0.9, help="of a GPU's "
                        "memory that an engine may take")  # fmt: skip
    parser.add_argument("--real-size", choices=tuple(SIZES), help="of the model that is loaded")
    args = parser.parse_args(argv)
    args.model = list(dict.fromkeys(args.model))
    if args.utilization == 0:
        raise UsageError("--utilization 0 leaves no memory; use a share such as 0.9")
    for name in args.model if args.gpus else []:
        if not is_divisible(MODELS[name].architecture, args.gpus):
            usable = [n for n in range(1, 65) if is_divisible(MODELS[name].architecture, n)]
            raise UsageError(f"--gpus {args.gpus} cannot divide the heads of {name}; use one of "
                             f"{', '.join(map(str, usable))}")  # fmt: skip
    return args


@dataclass(frozen=True)
class Row:
    """A model on `gpus` GPUs: bytes on each of them, and the blocks for which there is room."""

    name: str
    gpus: int
    weights: float
    per_token: float  # on one GPU
    room: float  # what weights and the largest batch leave; below 0: they do not fit
    blocks: int
    sequences: int

    @property
    def architecture(self) -> Architecture:
        return MODELS[self.name].architecture


def count(args: Namespace, name: str) -> Row:
    """The model on --gpus GPUs, or on the fewest that hold it and one sequence."""
    possible = [args.gpus] if args.gpus else [2**n for n in range(MOST_GPUS.bit_length())]
    for gpus in possible:
        a = MODELS[name].architecture
        if not is_divisible(a, gpus):
            break
        row = fit(args, name, gpus, args.context)
        if row.sequences:
            break
    return row


def fit(args: Namespace, name: str, gpus: int, context: int) -> Row:
    a = MODELS[name].architecture
    # GPUs that share a key-value head also repeat its small projections, which is left out here.
    weights = predict.rank_parameters(a, gpus) * DTYPE_BYTES[args.precision]
    per_token = bytes_per_token(a, args.kv_dtype, gpus)
    spec = GPUS[args.gpu]
    tokens, sequences = predict.default_batch(spec.memory_bytes, " ".join(spec.device_names))
    plan = predict.ServingPlan(
        gpus, gpus, precision=args.precision, batched_tokens=tokens, max_sequences=sequences,
        nvlink=spec.nvlink_bandwidth is not None,
    )  # fmt: skip
    kept = predict.reserved_activations(a, plan) + predict.engine_reserve(plan)
    room = args.utilization * spec.memory_bytes - kept - weights
    blocks = max(0, math.floor(room / (per_token * args.block_size)))
    sequences = blocks // math.ceil(context / args.block_size)
    return Row(name, gpus, weights, per_token, room, blocks, sequences)


def bytes_per_token(a: Architecture, dtype: str, gpus: int = 1) -> float:
    """What one token leaves in the cache of each of `gpus` tensor-parallel GPUs."""
    if a.latent is not None:
        width = a.latent.kv_lora_rank + a.latent.qk_rope_head_dim
    else:
        heads = math.ceil(a.num_key_value_heads / gpus)  # at least one
        width = 2 * heads * a.head_dim
    return a.num_hidden_layers * width * DTYPE_BYTES[dtype]


def is_divisible(a: Architecture, gpus: int) -> bool:
    """Whether heads and MLP can be divided over `gpus`, and key-value heads divided or repeated."""
    kv = a.num_attention_heads if a.latent else a.num_key_value_heads
    return (
        a.num_attention_heads % gpus == a.intermediate_size % gpus == 0
        and 0 in (kv % gpus, gpus % kv)
    )  # fmt: skip


def attention(a: Architecture) -> str:
    if a.latent is not None:
        return "MLA"
    group = a.num_attention_heads // a.num_key_value_heads
    return "MHA" if group == 1 else f"GQA, {group} to 1"


def show(run: Run, args: Namespace, rows: list[Row]) -> None:
    table = []
    for row in rows:
        whole = bytes_per_token(row.architecture, args.kv_dtype)
        cache = args.context * row.per_token
        table.append([
            row.name, attention(row.architecture), whole / 1e3, row.gpus, row.weights / 1e9,
            max(0.0, row.room) / 1e9, row.per_token * row.gpus / whole,
            row.blocks * args.block_size, row.sequences, row.weights / cache,
        ])  # fmt: skip
    run.table(
        "sequences",
        ["model", "attention", "KB per token", "GPUs", "weights GB", "cache GB",
         "copies of a token",
         "tokens", "sequences", "sequences where cache = weights"],
        table,
        caption=f"{args.context:,} tokens each on {args.gpu}, {args.utilization:.0%} used, "
        f"{args.precision} weights, {args.kv_dtype} cache; GB on each GPU",
    )  # fmt: skip
    for row in rows:
        run.print(f"verdict: {verdict(args, row)}")


def verdict(args: Namespace, row: Row) -> str:
    where = f"{row.name} on {row.gpus} {args.gpu}"
    if row.room < 0:
        return f"{where}: the weights alone are {-row.room / 1e9:.1f} GB too large for each GPU"
    if not row.sequences:
        return f"{where}: not one sequence of {args.context:,} tokens fits"
    copies = row.per_token * row.gpus / bytes_per_token(row.architecture, args.kv_dtype)
    twice = "" if copies == 1 else f"; each token is stored {copies:g} times"
    return f"{where}: {row.sequences:,} sequences of {args.context:,} tokens{twice}"


def check_formula(run: Run, args: Namespace, rows: list[Row]) -> None:
    """Against distlab's own, against published numbers, and against the engine's block manager."""
    models = {name: spec.architecture for name, spec in MODELS.items()}
    run.check_equal(
        "bytes per token are those of distlab.predict, for all named models",
        {name: bytes_per_token(a, args.kv_dtype) for name, a in models.items()},
        {name: predict.kv_bytes_per_token(a, args.kv_dtype) for name, a in models.items()},
    )
    run.check_equal(
        "and the published ones of Llama 3.1 405B and DeepSeek-V3, in bf16",
        {name: int(bytes_per_token(models[name], "bf16")) for name in PUBLISHED}, PUBLISHED,
    )  # fmt: skip
    least = min(rows, key=lambda row: row.blocks or math.inf)
    run.check_equal(
        "paged_engine's block manager gives as many sequences their blocks",
        admitted(least.blocks, args.block_size, args.context), least.sequences,
    )  # fmt: skip


def admitted(num_blocks: int, block_size: int, context: int) -> int:
    """Sequences of `context` tokens that get all their blocks from the engine's block manager."""
    from paged_engine.block_manager import BlockManager
    from paged_engine.request import Request
    from paged_engine.sampling_params import SamplingParams

    blocks, given = BlockManager(num_blocks, block_size, prefix_caching=False), 0
    while blocks.allocate(Request("", [0], SamplingParams()).sequences[0], context) is not None:
        given += 1
    return given


def draw(run: Run, args: Namespace, rows: list[Row]) -> None:
    series = []
    for row in rows:
        fitting = {c: fit(args, row.name, row.gpus, c).sequences for c in CONTEXTS}
        shown = {context: number for context, number in fitting.items() if number}
        label = f"{row.name} on {row.gpus}"
        series.append({"label": label, "x": list(shown), "y": list(shown.values())})
    run.figure(
        "kv_cache_sequences", kind="line", log_x=True, log_y=True, series=series,
        title=f"Sequences at once on {args.gpu}, {args.kv_dtype} cache",
        x_label="tokens of each sequence", y_label="sequences",
    )  # fmt: skip


if __name__ == "__main__":
    script.exit(main)
