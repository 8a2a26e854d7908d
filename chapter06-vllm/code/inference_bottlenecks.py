"""Why inference is two problems: prefill is limited by arithmetic, decode by memory.

A prompt of T tokens goes through the model in one pass (prefill): the weights are read once and
used T times. After that every pass makes one token for each sequence (decode): the weights are read
once and used as often as there are sequences in the batch, and every sequence's keys and values are
read besides. With f FLOPs for a token, W bytes of weights, C bytes of cache for a sequence, a batch
of B, and a machine of P FLOP/s and M bytes/s, a decode step takes at least

    max(B·f / P, (W + B·C) / M)

so up to B* = (W / M) / (f / P - C / M) more sequences cost nothing, and beyond it each costs its
arithmetic. Where C / M is above f / P, as with long contexts, no batch gets there: every sequence
brings bytes of its own, and batching them saves none. P and M are measured here, in the same run.

Run:
    python chapter06-vllm/code/inference_bottlenecks.py --figures build/figures
    python chapter06-vllm/code/inference_bottlenecks.py --context 1024 --batches 1 8 32

You should see: on the roofline, decode at batch 1 far left on the slope, prefill to the right on
the flat roof, and decode climbing from the one to the other as the batch grows. Step time hardly
changes up to B*, so tokens per second grow with the batch; then they stop growing. What is missing
to the bound is overhead: starting the operators, and products of a few rows, which are slower than
large ones.

Sources: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009; Pope et al., "Efficiently
Scaling Transformer Inference" (arXiv 2211.05102), section 2.
"""

from argparse import Namespace
from typing import Any

import torch

from distlab import hardware, measure, predict, script
from distlab.model import Llama, ModelConfig, num_parameters
from distlab.script import Run, UsageError
from inference.passes import (
    Machine,
    Pass,
    Rig,
    draw,
    flops_of,
    recorded,
    roofs,
    show_passes,
    show_roof,
    show_turn,
)

PRESETS = {
    "smoke": {"hidden": 128, "layers": 2, "vocab_size": 512, "context": 32, "batches": [1, 4, 16],
              "prompts": [4, 32, 128], "dtype": "float32", "repeats": 3, "memory_mib": 16},
    "laptop": {"hidden": 768, "layers": 8, "vocab_size": 8192, "context": 128,
               "batches": [1, 2, 4, 8, 16, 32, 64], "prompts": [1, 4, 16, 64, 256],
               "dtype": "float32", "repeats": 9},
    "gpu": {"hidden": 2048, "layers": 16, "vocab_size": 128_256, "context": 256,
            "batches": [1, 4, 16, 64, 128, 256], "prompts": [1, 16, 64, 256, 1024, 4096],
            "dtype": "bfloat16", "repeats": 15},
}  # fmt: skip
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # of the largest logit


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with script.run(args) as run, torch.inference_mode():
        torch.manual_seed(args.seed)
        with device:
            model = Llama(model_config(args)).to(dtype)
        run.metric("parameters", num_parameters(model), "params")
        check_formulas(run, model, args)
        rig = Rig(model, args.context)
        decode = [rig.decode(batch) for batch in args.batches]
        prefill = [rig.prefill(length) for length in args.prompts]
        memory = args.memory_mib * 2**20 if args.memory_mib else hardware.beyond_cache_bytes(device)
        machine = measure_all(device, dtype, [*decode, *prefill], memory, args)
        show_roof(run, machine, args.dtype)
        show_passes(run, machine, decode, prefill)
        show_turn(run, machine, model.config.architecture, decode)
        draw(run, machine, decode, prefill)
        check_passes(run, machine, decode, prefill, args)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--hidden", **positive, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", **positive)
    parser.add_argument("--vocab-size", **positive)
    parser.add_argument("--dtype", choices=ROUNDING)
    parser.add_argument("--context", **positive, help="tokens that a decode step attends to")
    parser.add_argument("--batches", **positive, nargs="+", metavar="B", help="of the decode steps")
    parser.add_argument("--prompts", **positive, nargs="+", metavar="T", help="prefill lengths")
    parser.add_argument("--repeats", **positive, help="timed passes of each size")
    parser.add_argument("--memory-mib", **positive, help="read to measure the bandwidth (default: "
                        "4 last caches)")  # fmt: skip
    parser.add_argument("--tolerance", type=script.positive_float, default=1.25,
                        metavar="X", help="how far a "
                        "pass's median may be above the roof's best, as a factor")  # fmt: skip
    parser.add_argument("--seed", type=script.non_negative_int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args(argv)
    if args.hidden % 64:
        raise UsageError(f"--hidden {args.hidden} is no multiple of 64; use 128, 768 or 2048")
    if args.repeats < 3:
        raise UsageError(f"--repeats {args.repeats} gives no median; use at least 3")
    args.device = hardware.chosen_device(args.device)
    for name in ("batches", "prompts"):
        setattr(args, name, sorted(set(getattr(args, name))))
        if len(getattr(args, name)) < 2:
            raise UsageError(f"--{name} {getattr(args, name)[0]} is no sweep; give at least two")
    return args


def model_config(args: Namespace) -> ModelConfig:
    """Heads of 64, two query heads to a key-value head, an MLP of 8/3 of the hidden size."""
    heads = args.hidden // 64
    kv_heads = heads // 2 if heads % 2 == 0 else heads
    inner = -(-8 * args.hidden // 3 // 64) * 64
    return ModelConfig(args.vocab_size, args.hidden, inner, args.layers, heads, kv_heads)


def measure_all(
    device: torch.device, dtype: torch.dtype, passes: list[Pass], memory: int, args: Namespace
) -> Machine:
    """Time all passes and what the roofs are made of, in turns: they drift together."""
    peak = hardware.measured_peak_flops(device, dtype, limit_s=0.5)
    streams = roofs(device, dtype, memory)
    functions = {name: stream.run for name, stream in streams.items()}
    functions |= {
        one.name: recorded(one.run) if device.type == "cuda" else one.run for one in passes
    }
    timings = measure.compare(functions, 2, args.repeats, device)
    for one in passes:
        one.timing = timings[one.name]
    best = {name: stream.amount / min(timings[name].samples) for name, stream in streams.items()}
    return Machine(max(peak, best.pop("square")), max(best.values()))


def check_formulas(run: Run, model: Llama, args: Namespace) -> None:
    """The predictions' FLOPs and bytes against torch's count and against the tensors themselves."""
    a, element = model.config.architecture, model.lm_head.weight.element_size()
    rig = Rig(model, args.context)
    for one in (rig.decode(args.batches[0]), rig.prefill(args.prompts[0])):
        run.check_equal(
            f"FLOPs of the products of {one.name}: the formula's are those that torch counts",
            flops_of(one.run),
            int(one.products),
        )
    read = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    run.check_equal(
        "bytes of weights that a pass reads: the formula's are those of the matrices",
        measure.tensor_bytes(read),
        predict.matmul_parameters(a) * element,
    )
    cache = rig.cache(1)
    run.check_equal(
        "bytes of cache of a token: the formula's are those of the tensors",
        measure.tensor_bytes([cache.keys, cache.values]),
        int(rig.cache_bytes_per_token * cache.keys.shape[3]),
    )
    tokens = torch.randint(0, args.vocab_size, (2, 9), device=model.lm_head.weight.device)
    cache = rig.cache(2)
    model.next_logits(tokens[:, :-1], cache)
    run.check_close(
        "prefill and a decode step give the logits of one pass over all tokens",
        model.next_logits(tokens[:, -1:], cache),
        model(tokens)[:, -1],
        ROUNDING[args.dtype],
        relative=True,
    )


def check_passes(
    run: Run, machine: Machine, decode: list[Pass], prefill: list[Pass], args: Namespace
) -> None:
    """Passes of the smoke size last microseconds: what they say of time is told, not judged."""
    shares = {
        f"the {one.name}": [machine.bound(one) / taken for taken in one.timing.samples]
        for one in [*decode, *prefill]
    }
    run.check_within("no pass is faster than its bound", shares, args.tolerance, unit="of the roof")
    for name, one in (
        ("the largest batch makes more tokens a second than the smallest", decode[-1]),
        ("a long prompt is read faster than tokens are made one by one", prefill[-1]),
    ):
        gains = [one.size / decode[0].size * ratio for ratio in decode[0].timing.ratios(one.timing)]
        run.check_within(name, gains, at_least=1.0, unit="times")


if __name__ == "__main__":
    script.exit(main)
