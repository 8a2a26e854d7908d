"""Operator fusion: what is read and written between the products, and what one pass over it saves.

Between its matrix products a layer does little arithmetic on much memory. Written as it is thought,
every operation reads its inputs and writes its result; fused, the inputs are read once and the
outputs written once. Where memory is the limit, the speed-up is the ratio of the bytes:

    predicted speed-up = bytes of all operations / bytes of inputs and outputs

The bytes of the operations are counted as they are called. Each operator is computed eagerly, by
torch.compile (--compile), and by hand: chapter 6's C++ on a CPU, one product in place of three, and
for sampling one operation less. Then all of them change places in a whole decode step of the
engine.

Run:
    python chapter07-sglang/code/operator_fusion.py --figures build/figures

You should see: on a large batch speed-ups near the ratio of bytes, or beyond, since what eager
operations write goes to memory that is new to the processor each time; little gain for one product
in place of three, whose bytes are the weights'; and in a decode step, where everything fits into
the caches, that what is saved is calls rather than bytes.

Source: Williams et al., "Roofline" (CACM 2009); Dao et al., "FlashAttention" (NeurIPS 2022).
"""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlab import script
from distlab.display import side_by_side
from distlab.hardware import chosen_device
from distlab.measure import Timing, compare, tensors_in
from distlab.run import Run
from distlab.serving.tiny_model import add_model_flags, model_directory
from paged_engine import kernels, torch_operators
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine
from paged_engine.kernels import Operators
from paged_engine.loading import load_tokenizer
from paged_engine.runner import ModelRunner
from paged_engine.sampling_params import SamplingParams

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"size": "smoke", "tokens": 256, "hidden": 256, "decoding": 4, "compile": False,
              "repeats": 5},
    "laptop": {"size": "laptop", "tokens": 2048, "hidden": 1024, "decoding": 8, "compile": True,
               "repeats": 15},
    "gpu": {"size": "laptop", "tokens": 32768, "hidden": 4096, "decoding": 64, "compile": True,
            "repeats": 30},
}  # fmt: skip
HEAD_DIM, VOCABULARY = 64, 8192
EPS, TEMPERATURE = 1e-5, 0.8
SAME = 1e-4  # float32, sums in another order; relative
STEPS = 8  # of the engine, in each turn


@dataclass
class Case:
    """One operator: as operations, by hand, and the bytes that the latter moves."""

    name: str
    eager: Callable[[], Tensor]
    by_hand: Callable[[], Tensor] | None
    own_bytes: int


class BytesMoved(TorchDispatchMode):
    """Bytes of the inputs and outputs of all operations called within; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tensors_in((args, kwargs, outputs)))
        return outputs


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, torch.inference_mode():
        device = torch.device(chosen_device(args.device))
        compare_operators(run, args, cases(args.tokens, args.hidden, device), device)
        in_a_step(run, args, device)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tokens", **positive, help="of the operators' inputs")
    parser.add_argument("--hidden", **positive, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--decoding", **positive, help="sequences in the engine's step")
    parser.add_argument("--repeats", **positive)
    parser.add_argument("--compile", action=script.argparse.BooleanOptionalAction,
                        help="measure torch.compile too, which takes its time")  # fmt: skip
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    if args.hidden % HEAD_DIM:
        raise script.UsageError(f"--hidden {args.hidden} is no multiple of {HEAD_DIM}; use 256")
    return args


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """As its formula reads, operation by operation."""
    if added is not None:
        x += added
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of `heads` [tokens, heads, head_dim]."""
    a, b = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def race(logits: Tensor, noise: Tensor) -> Tensor:
    """The token whose exponential clock rings first, which is one drawn by its probability."""
    return (torch.softmax(logits / TEMPERATURE, -1) / noise).argmax(-1)


def gumbel(logits: Tensor, noise: Tensor) -> Tensor:
    """The same token: p / noise is largest where its logarithm is, and no sum is needed."""
    return torch.sub(logits, noise.log(), alpha=TEMPERATURE).argmax(-1)


def cases(tokens: int, hidden: int, device: torch.device) -> list[Case]:
    """Operators of a layer of this width; in-place ones work on the same inputs again."""
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    x, added, weight = random(tokens, hidden), random(tokens, hidden) * 1e-6, random(hidden)
    gate_up, heads = random(tokens, 6 * hidden), random(tokens, hidden // HEAD_DIM, HEAD_DIM)
    angles = random(tokens, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    few = max(1, tokens // 64)
    logits, clocks = random(few, VOCABULARY), random(few, VOCABULARY).abs() + 1e-3
    parts = [random(n, hidden) for n in (hidden, hidden // 4, hidden // 4)]
    joined, row = torch.cat(parts), random(few, hidden)
    nowhere = torch.full((tokens,), -1, device=device)
    none = heads.new_empty(1, 0, 1, HEAD_DIM)  # a cache without heads: all of `heads` are turned

    turned = heads.clone()

    def rotate_by_hand() -> Tensor:
        kernels.rotate_and_store(turned, cos, sin, nowhere, none, none)  # in place, again and again
        return turned

    on_cpu = device.type == "cpu"
    norm_bytes, head_bytes = 4 * x.nbytes + weight.nbytes, 2 * heads.nbytes + 2 * cos.nbytes
    qkv_bytes = joined.nbytes + row.nbytes + few * len(joined) * 4
    return [
        Case("residual and RMSNorm", lambda: rms_norm(x, weight, EPS, added),
             (lambda: kernels.rms_norm(x, weight, EPS, added)) if on_cpu else None, norm_bytes),
        Case("RoPE", lambda: rotate(heads, cos, sin), rotate_by_hand if on_cpu else None,
             head_bytes),
        Case("SwiGLU", lambda: silu_mul(gate_up),
             (lambda: kernels.silu_mul(gate_up)) if on_cpu else None, gate_up.nbytes * 3 // 2),
        Case("Q, K and V", lambda: torch.cat([F.linear(row, part) for part in parts], -1),
             lambda: F.linear(row, joined), qkv_bytes),
        Case("sampling", lambda: race(logits, clocks), lambda: gumbel(logits, clocks),
             6 * logits.nbytes + 8 * few),  # logarithm, subtraction, maximum
    ]  # fmt: skip


def compare_operators(run: Run, args: Namespace, chosen: list[Case], device: torch.device) -> None:
    rows = []
    for case in run.progress(chosen, "operators"):
        ways = {"eager": case.eager}
        if args.compile:
            ways["compiled"] = torch.compile(case.eager, dynamic=False)
        if case.by_hand is not None:
            ways["by hand"] = case.by_hand
        with BytesMoved() as moved:
            made = case.eager()
        wanted = made.clone()
        for name, way in ways.items():
            run.check_close(f"{case.name}, {name}", way(), wanted, SAME, relative=True)
        took = compare(ways, 2, args.repeats, device)
        gains = {
            name: Timing(tuple(took["eager"].ratios(timing))).median
            for name, timing in took.items()
        }
        rows.append([case.name, moved.bytes / 1e6, case.own_bytes / 1e6,
                     moved.bytes / case.own_bytes, gains.get("compiled"),
                     gains.get("by hand")])  # fmt: skip
    run.table(
        "operators", ["operator", "moved eagerly, MB", "by hand, MB", "predicted speed-up",
                      "measured, compiled", "measured, by hand"], rows,
        caption=f"{args.tokens} tokens of {args.hidden} numbers; medians of ratios, in turns",
    )  # fmt: skip
    run.figure(
        "operator_fusion", kind="bar", title="What a single pass saves",
        x_label="operator", y_label="speed-up",
        series=[{"label": label, "x": [row[0] for row in rows], "y": [row[i] or 0 for row in rows]}
                for i, label in ((3, "predicted"), (5, "by hand"))],
    )  # fmt: skip


EAGER = Operators(
    rms_norm=rms_norm, silu_mul=silu_mul, rotate_and_store=torch_operators.rotate_and_store_all
)


def in_a_step(run: Run, args: Namespace, device: torch.device) -> None:
    """Decode steps of the engine with eager operators, with fused ones, with layers in one call."""
    config = EngineConfig(
        model_directory(args), device=device.type, max_sequences=args.decoding,
        num_blocks=args.decoding * 32, prefix_caching=False, compile=False,
    )  # fmt: skip
    runner, tokenizer = ModelRunner(config), load_tokenizer(config.model)
    model = runner.shard.model
    stack, fused = model.stack, kernels.operators(device, args.compile)
    ways = {"eager operators": (EAGER, None), "fused operators": (fused, None)}
    if stack is not None:
        ways["all layers in one call"] = (fused, stack)  # type: ignore[assignment]
    tokens: dict[str, list[int]] = {}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):  # the first one warms up
        for name, (operators, own_stack) in ways.items():
            model.operators, model.stack = operators, own_stack
            for layer in model.layers:
                layer.operators = operators
            made, seconds = decode(Engine(config, runner, tokenizer), args.decoding)
            tokens[name] = made
            if turn:
                samples[name].append(seconds)
    took = {name: Timing(tuple(values)) for name, values in samples.items()}
    eager = took["eager operators"]
    saved = saving(args, model.cos.shape[1] * 2, runner, fused, device)
    rows = [[name, *side_by_side(eager.median - saved if name == "fused operators" else None,
                                 timing.median, 1e3), Timing(tuple(eager.ratios(timing))).median]
            for name, timing in took.items()]  # fmt: skip
    run.table(
        "step", ["way", "predicted, ms", "measured, ms", "error, %", "speed-up"], rows,
        caption=f"a decode step of {args.decoding} sequences; predicted: eager, less what each "
                "operator saves alone",
    )  # fmt: skip
    run.check_equal("the same tokens every way", list(tokens.values()), [made] * len(ways))
    run.check_within("fused to eager step", took["fused operators"].ratios(eager), 1.0)
    runner.close()


def decode(engine: Engine, sequences: int) -> tuple[list[int], float]:
    """The tokens of some steps in which all decode, and a step's seconds."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + 2, ignore_eos=True)
    for place in range(sequences):
        engine.add_request([place + 1, 7, 9], params)
    engine.step()
    started = time.perf_counter()
    made = [output.token_ids[0] for _ in range(STEPS) for output in engine.step()]
    seconds = (time.perf_counter() - started) / STEPS
    engine.step()
    return made, seconds


def saving(
    args: Namespace, head_dim: int, runner: ModelRunner, fused: Operators, device: torch.device
) -> float:
    """Seconds that a step saves, by each operator's time alone on a step's sizes."""
    shape, tokens = runner.config, args.decoding
    x, weight = torch.randn(2, tokens, shape.hidden_size, device=device).unbind()
    gate_up = torch.randn(tokens, 2 * shape.intermediate_size, device=device)
    heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
    qkv = torch.randn(tokens, heads, head_dim, device=device)
    cos = torch.ones(tokens, head_dim // 2, device=device)
    slots = torch.arange(tokens, device=device)
    keys, values = runner.cache.keys[0], runner.cache.values[0]

    def operators(of: Operators) -> Callable[[], object]:
        def layer() -> None:
            for _ in range(2):
                of.rms_norm(x, weight[0], EPS, weight)
            of.silu_mul(gate_up)
            of.rotate_and_store(qkv, cos, cos, slots, keys, values)

        return layer

    ways = {"eager": operators(EAGER), "fused": operators(fused)}
    took = compare(ways, 3, 4 * args.repeats, device)
    return shape.num_hidden_layers * (took["eager"].median - took["fused"].median)


if __name__ == "__main__":
    script.exit(main)
