"""What to estimate, as flags describe it, and what to change in a plan that does not fit."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any, TypeVar

from distlab import script
from distlab.catalog import GPUS, MODELS, GpuSpec
from distlab.errors import UsageError
from distlab.predict import (
    DTYPE_BYTES,
    MOMENTS,
    PRECISIONS,
    Memory,
    ServingPlan,
    TrainingPlan,
    check_degrees,
    read_architecture,
)
from distlab.predict.architecture import Architecture

Plan = TypeVar("Plan", TrainingPlan, ServingPlan)
Change = dict[str, Any]  # fields of the plan and their new values
PRESETS = {size: {"verify_size": size} for size in ("smoke", "laptop", "gpu")}
MOST_SHOWN, MOST_DOUBLINGS = 3, 12  # suggestions; times that the GPUs are doubled for one
GPU_NUMBERS = ("gpu_memory_gb", "gpu_tflops", "gpu_bandwidth_gbs")

# What a flag is when it is not given, for the one workload and for the other.
SHARED = {"gpus": 1, "tp": 1, "pp": 1, "mfu": 0.4, "usd_per_gpu_hour": 2.5, "reserve_gb": 1.0}
TRAINING = SHARED | {
    "precision": "mixed", "optimizer": "adamw", "zero": 0, "fsdp": False, "seq_len": None,
    "micro_batch": 1, "accumulation": 1, "activation_checkpointing": False, "tokens": 1e12,
}  # fmt: skip
SERVING = SHARED | {
    "precision": "bf16", "kv_dtype": "bf16", "batch": 1, "context": None,
    "prefill_chunk": 2048, "tokens": 1e6, "target_tokens_per_second": None,
}  # fmt: skip


def parse_args(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the workload filled in; refuses flags of the other one."""
    parser = script.Parser(doc, PRESETS)
    parser.add_argument("workload", nargs="?", choices=("train", "infer"))
    add_model_and_gpu(parser)
    add_plan(parser)
    add_training(parser)
    add_serving(parser)
    group = parser.add_argument_group("verification")
    group.add_argument("--verify", action="store_true", help="compare with small training runs")
    group.add_argument("--verify-size", choices=tuple(PRESETS), help="size of their models")
    args = parser.parse_args(argv)
    if args.workload is not None:
        args = _with_defaults(args)
        _refuse_impossible(args)
    else:
        if not args.verify:
            raise script.UsageError("say what to estimate: train or infer, or use --verify")
        names = ("model", "config", "gpu", *GPU_NUMBERS, *(TRAINING | SERVING))
        given = [name for name in names if getattr(args, name) is not None]
        if given:
            raise script.UsageError(f"{_flag(given[0])} needs train or infer before it")
    return args


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    own, other = (TRAINING, SERVING) if args.workload == "train" else (SERVING, TRAINING)
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            raise script.UsageError(
                f"{_flag(name)} is for {'infer' if own is TRAINING else 'train'}, not for "
                f"{args.workload}; leave it out"
            )
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    known = PRECISIONS if args.workload == "train" else DTYPE_BYTES
    if args.precision not in known:
        raise script.UsageError(
            f"--precision {args.precision} is not for {args.workload}; use {', '.join(known)}"
        )
    if args.mfu == 0:
        raise script.UsageError("--mfu 0 would never finish; use a number above 0, such as 0.4")
    return args


def _refuse_impossible(args: argparse.Namespace) -> None:
    """Find what cannot be, in the model, the GPU or the degrees, before anything is printed."""
    _, a = chosen_model(args)
    plan = training_plan(a, args) if args.workload == "train" else serving_plan(a, args)
    check_degrees(a, plan.gpus, plan.tp, plan.pp)
    chosen_gpu(args)


def add_model_and_gpu(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--model", choices=tuple(MODELS), help="default: llama-3-8b")
    model.add_argument("--config", metavar="FILE", help="a Hugging Face config.json")
    gpu = parser.add_argument_group("GPU (default: h100; numbers replace those of --gpu)")
    gpu.add_argument("--gpu", choices=tuple(GPUS))
    gpu.add_argument("--gpu-memory-gb", type=script.positive_float, metavar="GB")
    gpu.add_argument("--gpu-tflops", type=script.positive_float, metavar="T", help="dense peak")
    gpu.add_argument("--gpu-bandwidth-gbs", type=script.positive_float, metavar="GB/s")


def add_plan(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("both workloads")
    group.add_argument("--gpus", type=script.positive_int, help="number of GPUs (1)")
    group.add_argument("--tp", type=script.positive_int, help="tensor parallel degree (1)")
    group.add_argument("--pp", type=script.positive_int, help="pipeline stages (1)")
    group.add_argument(
        "--precision",
        choices=tuple(dict.fromkeys([*PRECISIONS, *DTYPE_BYTES])),
        help=f"train: {', '.join(PRECISIONS)} (mixed); infer: {', '.join(DTYPE_BYTES)} (bf16)",
    )
    group.add_argument("--mfu", type=script.fraction, help="assumed share of the peak (0.4)")
    group.add_argument("--tokens", type=script.positive_float, help="cost of (1e12; infer 1e6)")
    group.add_argument("--usd-per-gpu-hour", type=script.positive_float, help="assumed price (2.5)")
    group.add_argument(
        "--reserve-gb", type=script.positive_float, help="CUDA context, NCCL buffers (1)"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("train")
    sharding = group.add_mutually_exclusive_group()
    sharding.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage (0)")
    sharding.add_argument(
        "--fsdp", action="store_true", default=None, help="full sharding, the same as --zero 3"
    )
    group.add_argument("--optimizer", choices=tuple(MOMENTS), help="(adamw)")
    group.add_argument("--seq-len", type=script.positive_int, help="(4096, or the model's limit)")
    group.add_argument("--micro-batch", type=script.positive_int, help="sequences at once (1)")
    group.add_argument("--accumulation", type=script.positive_int, help="micro-batches a step (1)")
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        default=None,
        help="recompute each layer in the backward pass",
    )


def add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("infer")
    group.add_argument("--batch", type=script.positive_int, help="sequences per replica (1)")
    group.add_argument("--context", type=script.positive_int, help="tokens of each (4096)")
    group.add_argument("--kv-dtype", choices=tuple(DTYPE_BYTES), help="type of the cache (bf16)")
    group.add_argument("--prefill-chunk", type=script.positive_int, help="tokens at once (2048)")
    group.add_argument(
        "--target-tokens-per-second", type=script.positive_float, metavar="N", help="of all GPUs"
    )


def chosen_model(args: argparse.Namespace) -> tuple[str, Architecture]:
    """The model's name and architecture; raises `UsageError` for a config that is none."""
    if args.config is None:
        name = args.model or "llama-3-8b"
        return name, MODELS[name].architecture
    return str(args.config), read_architecture(args.config)


def chosen_gpu(args: argparse.Namespace) -> GpuSpec:
    """The named GPU with the numbers given by flags, or a GPU of three given numbers alone."""
    given = [name for name in GPU_NUMBERS if getattr(args, name) is not None]
    missing = [_flag(name) for name in GPU_NUMBERS if name not in given]
    if given and missing and args.gpu is None:
        raise script.UsageError(
            f"{_flag(given[0])} alone is no GPU; add {' and '.join(missing)}, or --gpu NAME"
        )
    spec = GPUS[args.gpu or "h100"]
    if args.gpu is None and given:
        spec = replace(spec, nvlink_bandwidth=None, pcie_bandwidth=None, source="flags")
    if args.gpu_memory_gb:
        spec = replace(spec, memory_bytes=args.gpu_memory_gb * 1e9)
    if args.gpu_bandwidth_gbs:
        spec = replace(spec, memory_bandwidth=args.gpu_bandwidth_gbs * 1e9)
    if args.gpu_tflops:
        peaks = dict.fromkeys(("fp32", "tf32", "bf16", "fp16", "fp8"), args.gpu_tflops * 1e12)
        spec = replace(spec, peak_flops=peaks)
    return spec


def training_plan(a: Architecture, args: argparse.Namespace) -> TrainingPlan:
    return TrainingPlan(
        gpus=args.gpus,
        tp=args.tp,
        pp=args.pp,
        zero=3 if args.fsdp else args.zero,
        precision=args.precision,
        optimizer=args.optimizer,
        seq_len=_length(a, "--seq-len", args.seq_len),
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        checkpointing=args.activation_checkpointing,
    )


def serving_plan(a: Architecture, args: argparse.Namespace) -> ServingPlan:
    return ServingPlan(
        gpus=args.gpus,
        tp=args.tp,
        pp=args.pp,
        precision=args.precision,
        kv_dtype=args.kv_dtype,
        batch=args.batch,
        context=_length(a, "--context", args.context),
        prefill_chunk=args.prefill_chunk,
    )


def _length(a: Architecture, flag: str, length: int | None) -> int:
    """Only learned positions end; rotary ones can be used beyond what the model was trained on."""
    if length is None:
        return min(4096, a.max_position_embeddings)
    if a.learned_positions and length > a.max_position_embeddings:
        raise script.UsageError(
            f"{flag} {length} is more than the model's {a.max_position_embeddings} learned "
            f"positions; use {a.max_position_embeddings} or fewer"
        )
    return length


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Suggestion:
    """Flags to add or change, and what the fullest GPU then holds."""

    flags: str
    gpus: int
    memory: Memory


def suggest(
    plan: Plan, kinds: list[list[Change]], memory_of: Callable[[Plan], Memory], limit: float
) -> list[Suggestion]:
    """Up to three ways to bring `plan` to `limit` bytes or fewer: fewest GPUs, then fewest changes.

    `kinds` are kinds of change, the mildest first, each a list of changes to try. Of every set of
    kinds the first plan that fits counts, unless fewer of the same kinds do. GPUs are doubled only
    when nothing else will do.
    """
    for doublings in range(MOST_DOUBLINGS + 1):
        larger = replace(plan, gpus=plan.gpus * 2**doublings)
        found: dict[frozenset[int], Suggestion] = {}
        for count in range(len(kinds) + 1):
            for chosen in map(frozenset, combinations(range(len(kinds)), count)):
                if len(found) == MOST_SHOWN or any(fewer <= chosen for fewer in found):
                    continue
                tried = [kinds[index] for index in sorted(chosen)]
                if fitting := _first_that_fits(plan, larger, tried, memory_of, limit):
                    found[chosen] = fitting
        if found:
            return list(found.values())
    return []


def training_changes(plan: TrainingPlan) -> list[list[Change]]:
    """Sharding costs least, then recomputation; another optimizer comes last."""
    halvings = [2**n for n in range(1, 12) if plan.micro_batch % 2**n == 0]
    return [
        [{"zero": stage} for stage in range(plan.zero + 1, 4)],
        [] if plan.checkpointing else [{"checkpointing": True}],
        [
            {"micro_batch": plan.micro_batch // n, "accumulation": plan.accumulation * n}
            for n in halvings
        ],
        [{"tp": plan.tp * n} for n in (2, 4, 8) if plan.tp * n <= 8],
        [{"pp": plan.pp * n} for n in (2, 4, 8, 16)],
        [{"optimizer": "adamw-8bit"}] if plan.optimizer == "adamw" else [],
    ]


def serving_changes(plan: ServingPlan) -> list[list[Change]]:
    """A narrower cache and a smaller batch come before narrower weights."""
    wide = ("fp32", "bf16", "fp16")
    return [
        [{"kv_dtype": "fp8"}] if plan.kv_dtype in wide else [],
        [{"batch": plan.batch // 2**n} for n in range(1, 20) if plan.batch // 2**n],
        [{"precision": "fp8"}, {"precision": "int4"}] if plan.precision in wide else [],
        [{"tp": plan.tp * n} for n in (2, 4, 8) if plan.tp * n <= 8],
        [{"pp": plan.pp * n} for n in (2, 4, 8, 16)],
    ]


def largest_batch(
    plan: ServingPlan, memory_of: Callable[[ServingPlan], Memory], limit: float
) -> int:
    """The most sequences per replica that fit, 0 where not even one does; found by bisection."""

    def fits(batch: int) -> bool:
        return memory_of(replace(plan, batch=batch)).needed <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _first_that_fits(
    plan: Plan,
    larger: Plan,
    kinds: list[list[Change]],
    memory_of: Callable[[Plan], Memory],
    limit: float,
) -> Suggestion | None:
    for changes in product(*kinds):
        changed = larger
        for change in changes:
            changed = replace(changed, **change)
        try:
            memory = memory_of(changed)
        except UsageError:  # degrees that this model or number of GPUs cannot have
            continue
        if memory.needed <= limit:
            return Suggestion(_flags(plan, changed), changed.gpus, memory)
    return None


def _flags(plan: Plan, changed: Plan) -> str:
    words = []
    for name in (field.name for field in fields(plan)):
        if (value := getattr(changed, name)) == getattr(plan, name):
            continue
        flag = name.replace("_", "-")
        words.append("--activation-checkpointing" if value is True else f"--{flag} {value}")
    return " ".join(words)
