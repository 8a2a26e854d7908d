"""What to estimate, as flags describe it."""

import argparse
from dataclasses import replace
from typing import get_args

from distlab import script
from distlab.catalog import GPUS, MODELS, GpuSpec
from distlab.predict import (
    DTYPE_BYTES,
    MOMENTS,
    PRECISIONS,
    Architecture,
    ServingPlan,
    TrainingPlan,
    check_plan,
    check_serving_plan,
    default_batch,
    measured_weight_bytes,
    read_architecture,
    read_config_json,
    read_quantization,
)
from distlab.predict.activations import Kernels, Recompute

PRESETS = {size: {"verify_size": size} for size in ("smoke", "laptop", "gpu")}
GPU_NUMBERS = ("gpu_memory_gb", "gpu_tflops", "gpu_bandwidth_gbs")

# What a flag is when it is not given, for the one workload and for the other; None: see the plan.
SHARED = {"gpus": 1, "tp": 1, "pp": 1, "mfu": None, "usd_per_gpu_hour": 2.5, "reserve_gb": None}
TRAINING = SHARED | {
    "precision": "mixed", "optimizer": "adamw", "zero": 0, "fsdp": False, "seq_len": None,
    "micro_batch": 1, "accumulation": 1, "activation_checkpointing": "none", "kernels": "eager",
    "cp": 1, "ep": 1, "virtual_stages": 1, "sequence_parallel": False, "offload": "none",
    "replicate": 1, "no_reshard_after_forward": False, "no_gradient_sync": False,
    "efficiency": None, "tokens": 1e12,
}  # fmt: skip
SERVING = SHARED | {
    "precision": None, "kv_dtype": "bf16", "batch": 1, "context": None,
    "gpu_memory_utilization": 0.9, "max_num_batched_tokens": None, "max_num_seqs": None,
    "tokens": 1e6, "target_tokens_per_second": None,
}  # fmt: skip
MFU = EFFICIENCY = 0.4  # of the peak, where no flag says another
TRAINING_RESERVE = 1e9  # bytes: CUDA's context and NCCL's buffers


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
    if args.precision is not None and args.precision not in known:
        raise script.UsageError(
            f"--precision {args.precision} is not for {args.workload}; use {', '.join(known)}"
        )
    for name, why in (
        ("mfu", "would never finish"),
        ("efficiency", "would never finish"),
        ("gpu_memory_utilization", "leaves an engine nothing"),
    ):
        if getattr(args, name, None) == 0:
            raise script.UsageError(f"{_flag(name)} 0 {why}; use a number above 0, such as 0.4")
    return args


def _refuse_impossible(args: argparse.Namespace) -> None:
    """Find what cannot be, in the model, the GPU or the degrees, before anything is printed."""
    _, a = chosen_model(args)
    if args.workload == "train":
        check_plan(a, training_plan(a, args))
    else:
        check_serving_plan(a, serving_plan(a, args))
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
        help=f"train: {', '.join(PRECISIONS)} (mixed); infer: {', '.join(DTYPE_BYTES)} (the "
        "--config's, or bf16)",
    )
    use = group.add_mutually_exclusive_group()
    use.add_argument(
        "--mfu", type=script.fraction,
        help="share of the peak that the model's own FLOPs are, bubble and recomputation inside",
    )  # fmt: skip
    use.add_argument(
        "--efficiency", type=script.fraction,
        help="share of the peak while a GPU computes; recomputation and bubble on top (0.4)",
    )  # fmt: skip
    group.add_argument("--tokens", type=script.positive_float, help="cost of (1e12; infer 1e6)")
    group.add_argument("--usd-per-gpu-hour", type=script.positive_float, help="assumed price (2.5)")
    group.add_argument(
        "--reserve-gb", type=script.positive_float, metavar="GB",
        help="what other than torch takes: CUDA, NCCL (1; infer: as engines' logs have it)",
    )  # fmt: skip


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
        nargs="?",
        const="full",
        choices=get_args(Recompute),
        help="recompute in the backward pass: whole layers (full), or all but attention and every "
        "second matrix product (selective)",
    )
    group.add_argument("--kernels", choices=get_args(Kernels), help="what is fused (eager)")
    group.add_argument(
        "--sequence-parallel", action="store_true", default=None, help="--tp divides norms, too"
    )
    group.add_argument("--cp", type=script.positive_int, help="context parallel degree (1)")
    group.add_argument("--ep", type=script.positive_int, help="expert parallel degree (1)")
    group.add_argument(
        "--virtual-stages", type=script.positive_int, metavar="N",
        help="model chunks per pipeline stage, interleaved (1)",
    )  # fmt: skip
    add_sharding(group)


def add_sharding(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--offload", choices=("none", "optimizer", "all"), help="to the host's memory (none)"
    )
    group.add_argument(
        "--replicate", type=script.positive_int, metavar="N",
        help="hybrid sharding: groups of ranks that each hold all shards (1)",
    )  # fmt: skip
    group.add_argument(
        "--no-reshard-after-forward", action="store_true", default=None,
        help="--fsdp keeps weights gathered for the whole step, as pipelines do",
    )  # fmt: skip
    group.add_argument(
        "--no-gradient-sync", action="store_true", default=None,
        help="whole gradients until the last micro-batch of a step",
    )  # fmt: skip


def add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("infer")
    group.add_argument("--batch", type=script.positive_int, help="sequences per replica (1)")
    group.add_argument("--context", type=script.positive_int, help="tokens of each (4096)")
    group.add_argument("--kv-dtype", choices=tuple(DTYPE_BYTES), help="type of the cache (bf16)")
    group.add_argument(
        "--gpu-memory-utilization", type=script.fraction, help="share for the engine (0.9)"
    )
    group.add_argument(
        "--max-num-batched-tokens", type=script.positive_int, metavar="N",
        help="tokens of the largest pass (8192 from 70 GiB on, but for A100s; else 2048)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-seqs", type=script.positive_int, metavar="N",
        help="sequences of the largest batch (1024 and 256, likewise)",
    )  # fmt: skip
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
        recompute=args.activation_checkpointing,
        cp=args.cp,
        ep=args.ep,
        chunks=args.virtual_stages,
        sequence_parallel=args.sequence_parallel,
        kernels=args.kernels,
        offload=args.offload,
        replicate=args.replicate,
        reshard_after_forward=not args.no_reshard_after_forward,
        reduce_each=not args.no_gradient_sync,
    )


def serving_plan(a: Architecture, args: argparse.Namespace) -> ServingPlan:
    """The plan; weights as --precision says, else as the --config's folder and file do."""
    gpu = chosen_gpu(args)
    tokens, sequences = default_batch(gpu.memory_bytes, " ".join(gpu.device_names))
    quantization = weight_bytes = None
    if args.config is not None and args.precision is None:
        quantization = read_quantization(read_config_json(args.config))
        weight_bytes = measured_weight_bytes(args.config)
    return ServingPlan(
        gpus=args.gpus,
        tp=args.tp,
        pp=args.pp,
        precision=args.precision or "bf16",
        kv_dtype=args.kv_dtype,
        batch=args.batch,
        context=_length(a, "--context", args.context),
        batched_tokens=args.max_num_batched_tokens or tokens,
        max_sequences=args.max_num_seqs or sequences,
        quantization=quantization,
        weight_bytes=weight_bytes,
        reserve=_reserve(args),
        nvlink=gpu.nvlink_bandwidth is not None,
    )


def usable_bytes(args: argparse.Namespace, gpu: GpuSpec) -> float:
    """What a plan may use of one GPU."""
    if args.workload == "train":
        return gpu.memory_bytes - (_reserve(args) or TRAINING_RESERVE)
    return gpu.memory_bytes * args.gpu_memory_utilization


def _reserve(args: argparse.Namespace) -> float | None:
    return None if args.reserve_gb is None else args.reserve_gb * 1e9


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
