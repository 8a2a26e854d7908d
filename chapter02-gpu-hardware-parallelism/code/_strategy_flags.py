"""The flags of choose_strategy.py, and the job and the cluster that they describe."""

import argparse

from _strategy_links import Cluster
from _strategy_plans import Job

from distlab import predict, script
from distlab.catalog import GPUS, MODELS, GpuSpec
from distlab.cluster.links import parse_rate
from distlab.predict import Architecture

RESERVE = 1e9  # CUDA's context and NCCL's buffers, as chapter 1 assumes


def parse_args(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = script.Parser(doc, {"smoke": {}, "laptop": {}, "gpu": {}})
    group = parser.add_argument_group("what is trained")
    model = group.add_mutually_exclusive_group()
    model.add_argument("--model", choices=tuple(MODELS), default="llama-3-70b")
    model.add_argument("--config", metavar="FILE", help="a Hugging Face config.json")
    group.add_argument("--seq-len", type=script.positive_int, default=4096)
    batch = group.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=script.positive_int, help="sequences (1024)")
    batch.add_argument("--global-batch-tokens", type=script.positive_int, help="the same in tokens")
    group.add_argument("--precision", choices=tuple(predict.PRECISIONS), default="mixed")
    group.add_argument("--optimizer", choices=tuple(predict.MOMENTS), default="adamw")

    group = parser.add_argument_group("the cluster")
    group.add_argument("--gpus", type=script.positive_int, default=64)
    group.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    group.add_argument("--gpus-per-node", type=script.positive_int, default=8)
    group.add_argument(
        "--intra-node", default="nvlink", metavar="LINK",
        help="nvlink or pcie (as in the GPU's data sheet), or GB/s per GPU in one direction",
    )  # fmt: skip
    group.add_argument("--interconnect", default="400gbit", metavar="RATE", help="of one port")
    group.add_argument(
        "--ports-per-node", type=script.positive_int, help="network ports (default: one per GPU)"
    )
    group.add_argument(
        "--latency", type=script.positive_float, default=5.0, metavar="US",
        help="of a message between nodes, in microseconds",
    )  # fmt: skip

    group = parser.add_argument_group("assumptions")
    group.add_argument(
        "--efficiency", type=script.fraction, default=0.55, help="of the GPU's peak, while it works"
    )
    group.add_argument(
        "--link-efficiency", type=script.fraction, default=0.8, help="of the links' rates"
    )
    group.add_argument("--no-overlap", action="store_true", help="never compute while sending")
    group.add_argument("--top", type=script.positive_int, default=10, help="plans in the table")
    return parser.parse_args(argv)


def chosen_job(args: argparse.Namespace) -> tuple[str, Job]:
    """The model's name and the job; raises `UsageError` for what cannot be."""
    name, a = _chosen_model(args)
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        nearest = -(-args.gpus // args.gpus_per_node) * args.gpus_per_node
        raise script.UsageError(
            f"--gpus {args.gpus} is no multiple of --gpus-per-node {args.gpus_per_node}; "
            f"use --gpus {nearest}"
        )
    if a.learned_positions and args.seq_len > a.max_position_embeddings:
        raise script.UsageError(
            f"--seq-len {args.seq_len} is more than the model's {a.max_position_embeddings} "
            f"learned positions; use {a.max_position_embeddings} or fewer"
        )
    per_node = min(args.gpus_per_node, args.gpus)
    return name, Job(
        a, args.gpus, per_node, args.seq_len, _sequences(args), args.precision, args.optimizer
    )


def chosen_cluster(args: argparse.Namespace) -> Cluster:
    gpu = GPUS[args.gpu]
    for flag in ("efficiency", "link_efficiency"):
        if getattr(args, flag) == 0:
            name = flag.replace("_", "-")
            raise script.UsageError(f"--{name} 0 would never finish; use a number above 0")
    peak = predict.peak_for(gpu.peak_flops, predict.PRECISIONS[args.precision].arithmetic)
    inner = _inner_rate(args, gpu) * args.link_efficiency
    rate = parse_rate(args.interconnect, f"--interconnect {args.interconnect}")
    outer = rate / 8 * args.link_efficiency
    latency = args.latency * 1e-6
    per_node = min(args.gpus_per_node, args.gpus)
    return Cluster(
        gpus=args.gpus,
        gpus_per_node=per_node,
        ports=args.ports_per_node or per_node,
        flops=peak * args.efficiency,
        memory_bandwidth=gpu.memory_bandwidth * args.efficiency,
        memory=gpu.memory_bytes - RESERVE,
        inner=(min(latency, 3e-6), 1 / inner),
        outer=(latency, 1 / outer),
        hidden=frozenset() if args.no_overlap else frozenset({"DP", "CP", "PP"}),
    )


def _inner_rate(args: argparse.Namespace, gpu: GpuSpec) -> float:
    """Bytes per second in one direction; data sheets count both."""
    named = {"nvlink": gpu.nvlink_bandwidth or gpu.pcie_bandwidth, "pcie": gpu.pcie_bandwidth}
    if args.intra_node not in named:
        return _gigabytes(args.intra_node)
    both = named[args.intra_node]
    if both is None:
        raise script.UsageError(
            f"--intra-node {args.intra_node} is unknown for --gpu {args.gpu}; give GB/s: 300"
        )
    return both / 2


def _gigabytes(text: str) -> float:
    try:
        return script.positive_float(text) * 1e9
    except argparse.ArgumentTypeError as error:
        raise script.UsageError(
            f"--intra-node {text} is no link; use nvlink, pcie or GB/s such as 300"
        ) from error


def _sequences(args: argparse.Namespace) -> int:
    if args.global_batch_tokens is None:
        return args.global_batch or 1024
    sequences, rest = divmod(args.global_batch_tokens, args.seq_len)
    if rest:
        nearest = max(1, sequences) * args.seq_len
        raise script.UsageError(
            f"--global-batch-tokens {args.global_batch_tokens} is no multiple of --seq-len "
            f"{args.seq_len}; use {nearest}"
        )
    return int(sequences)


def _chosen_model(args: argparse.Namespace) -> tuple[str, Architecture]:
    if args.config is None:
        return args.model, MODELS[args.model].architecture
    return str(args.config), predict.read_architecture(args.config)
