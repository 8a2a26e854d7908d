"""Every way to divide a model's training over G GPUs: why one cannot be, and which is best."""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from distlab import predict, script
from distlab.catalog import GPUS, MODELS, GpuSpec
from distlab.cluster.links import parse_rate
from distlab.predict import Architecture, Memory, TrainingPlan, training_stage_memory
from distlab.predict.activations import Kernels, Recompute
from parallelism.cost import Cluster, StepTime, stage_kinds, step_time

MOST_CHUNKS = 8  # of a pipeline stage; more is not seen in practice
SHORTEST_PIECE = 4096  # tokens: with less the kernels get slow, which the cost model does not see
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
MOST_SHORT = 3  # pipeline stages that have one layer less than the others


@dataclass(frozen=True)
class Job:
    """What is to be trained, on how many GPUs; the plans differ in everything else."""

    model: Architecture
    gpus: int
    gpus_per_node: int
    seq_len: int
    global_batch: int  # sequences
    precision: str = "mixed"
    optimizer: str = "adamw"
    kernels: Kernels = "eager"


@dataclass(frozen=True)
class Degrees:
    """G = tp·cp·ep·dp·pp, from the innermost to the outermost; data parallelism is ep·dp."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1


def plans(job: Job, dropped: Counter[str]) -> Iterator[TrainingPlan]:
    """Every plan whose degrees divide; what does not is counted in `dropped`, by reason."""
    for degrees in all_degrees(job):
        if reason := why_not(job, degrees):
            dropped[reason] += 1
        else:
            yield from variants(job, degrees)


def all_degrees(job: Job) -> Iterator[Degrees]:
    """Every ordered factorization of G; the expert degree is 1 where the model has no experts."""
    for tp in divisors_of(job.gpus):
        for cp in divisors_of(job.gpus // tp):
            for pp in divisors_of(job.gpus // (tp * cp)):
                data = job.gpus // (tp * cp * pp)
                for ep in divisors_of(data) if job.model.experts else [1]:
                    yield Degrees(tp, cp, ep, data // ep, pp)


def count_degrees(job: Job) -> int:
    """How many `all_degrees` must give: each prime power q^e of G in C(e + k - 1, k - 1) ways,
    the ways to put e equal balls into the k boxes (tp, cp, pp, dp and, with experts, ep)."""
    boxes = 5 if job.model.experts else 4
    return math.prod(math.comb(e + boxes - 1, boxes - 1) for e in prime_exponents(job.gpus))


def why_not(job: Job, d: Degrees) -> str:
    """What the degrees do not divide, the first of it; empty if they can be."""
    a = job.model
    columns = [a.intermediate_size, *([a.experts.intermediate_size] if a.experts else [])]
    key_values = a.num_attention_heads if a.latent else a.num_key_value_heads
    if math.gcd(a.num_attention_heads, key_values, *columns) % d.tp:
        return "TP does not divide the heads, the key-value heads or the MLP's columns"
    if job.gpus_per_node % d.tp and d.tp % job.gpus_per_node:
        return "a TP group would straddle two nodes"
    if d.cp > 1 and job.seq_len < SHORTEST_PIECE * d.cp:
        return f"CP would leave a rank fewer than {SHORTEST_PIECE} tokens of a sequence"
    if d.cp > 1 and job.seq_len % (2 * d.cp * d.tp):  # each rank has an early and a late piece
        return "2·CP·TP does not divide the sequence"
    if d.pp > a.num_hidden_layers or uneven(a, d.pp):
        return f"PP does not divide the layers, more than {MOST_SHORT} stages would be one short"
    if a.experts and a.experts.num_experts % d.ep:
        return "EP does not divide the experts"
    if job.global_batch % (d.dp * d.ep):
        return "DP does not divide the global batch"
    return ""


def variants(job: Job, d: Degrees) -> Iterator[TrainingPlan]:
    """The plans of these degrees: micro-batch (a power of two), chunks, ZeRO stage, checkpointing.

    Tensor parallelism always comes with sequence parallelism, which costs no more bytes.
    """
    local_batch = job.global_batch // (d.dp * d.ep)
    for micro_batch in (2**n for n in range(local_batch.bit_length()) if not local_batch % 2**n):
        accumulation = local_batch // micro_batch
        for chunks in chunk_counts(job.model, d.pp, accumulation):
            for zero in range(4) if d.dp * d.ep * d.cp > 1 else [0]:
                for recompute in RECOMPUTE:
                    yield TrainingPlan(
                        job.gpus, d.tp, d.pp, zero, job.precision, job.optimizer, job.seq_len,
                        micro_batch, accumulation, recompute, d.cp, d.ep, chunks, d.tp > 1,
                        job.kernels,
                    )  # fmt: skip


def chunk_counts(a: Architecture, pp: int, micro_batches: int) -> list[int]:
    """1 (1F1B), and the chunks that the interleaved schedule can have: it needs p | m."""
    if pp == 1 or micro_batches % pp:
        return [1]
    most = min(MOST_CHUNKS, a.num_hidden_layers // pp)
    return [v for v in range(1, most + 1) if v == 1 or not uneven(a, pp * v)]


def uneven(a: Architecture, parts: int) -> bool:
    """Whether the layers cannot be cut into `parts` of one size but for a few.

    A few are usual, since the embedding and the output are work too: Llama 3 405B has 126 layers
    for 16 stages of 8 (arXiv 2407.21783, section 3.3.2), DeepSeek-V3 61 (arXiv 2412.19437).
    """
    return -a.num_hidden_layers % parts > MOST_SHORT


def name(plan: TrainingPlan) -> str:
    """TP 8 x PP 4 x DP 2, ZeRO-1: the degrees above 1 and the sharding."""
    degrees = {"TP": plan.tp, "CP": plan.cp, "PP": plan.pp, "DP": plan.data_parallel}
    parts = [f"{kind} {degree}" for kind, degree in degrees.items() if degree > 1]
    if plan.ep > 1:
        parts[-1] += f" (EP {plan.ep})"
    sharding = ["", "ZeRO-1", "ZeRO-2", "FSDP"][plan.zero]
    return ", ".join(filter(None, [" x ".join(parts) or "one GPU", sharding]))


def divisors_of(count: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})


def prime_exponents(count: int) -> list[int]:
    exponents = []
    factor = 2
    while count > 1:
        exponent = 0
        while count % factor == 0:
            count, exponent = count // factor, exponent + 1
        exponents += [exponent] if exponent else []
        factor += 1
    return exponents


AS_FAST = 0.02  # nearer to the fastest than this, the simpler plan is first


@dataclass(frozen=True)
class Candidate:
    plan: TrainingPlan
    memory: Memory
    time: StepTime


@dataclass
class Search:
    """All plans of a job on a cluster, with the reasons why others are none."""

    job: Job
    cluster: Cluster
    candidates: list[Candidate]
    not_dividing: Counter[str]

    @property
    def fitting(self) -> list[Candidate]:
        return [one for one in self.candidates if one.memory.needed <= self.cluster.memory]

    @property
    def leanest(self) -> Candidate:
        """The plan that needs least memory, whether it fits or not."""
        return min(self.candidates, key=lambda one: one.memory.needed)

    def too_large(self) -> Counter[str]:
        """How many plans do not fit, by what is too much for a GPU."""
        return Counter(
            reason for one in self.candidates if (reason := does_not_fit(one, self.cluster))
        )


def search(job: Job, cluster: Cluster) -> Search:
    not_dividing: Counter[str] = Counter()
    candidates = [
        Candidate(plan, fullest_gpu(job.model, plan), step_time(job.model, plan, cluster))
        for plan in plans(job, not_dividing)
    ]
    return Search(job, cluster, candidates, not_dividing)


def fullest_gpu(a: Architecture, plan: TrainingPlan) -> Memory:
    """As `predict.training_memory`, but of equal pipeline stages only the first is looked at."""
    stages = (training_stage_memory(a, plan, stage) for stage, _ in stage_kinds(a, plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def does_not_fit(one: Candidate, cluster: Cluster) -> str:
    memory = one.memory
    state = memory.weights + memory.gradients + memory.optimizer
    if state > cluster.memory:
        return "weights, gradients and optimizer alone are more than a GPU holds"
    if memory.needed > cluster.memory:
        return "with the activations it is more than a GPU holds"
    return ""


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By step time; but first the simplest of those within 2 % of the fastest, since no model of
    the time is more exact than that."""
    order = sorted(candidates, key=lambda one: (float(f"{one.time.total:.4g}"), simplicity(one)))
    if not order:
        return []
    limit = min(one.time.total for one in order) * (1 + AS_FAST)
    winner = min((one for one in order if one.time.total <= limit), key=simplicity)
    return [winner, *(one for one in order if one is not winner)]


def simplicity(one: Candidate) -> tuple[float, ...]:
    """The simplest is least: few kinds of parallelism, little sharding, nothing computed twice."""
    plan = one.plan
    kinds = sum(degree > 1 for degree in (plan.tp, plan.cp, plan.pp, plan.ep))
    sharding = (plan.zero, plan.checkpointing, plan.cp, plan.chunks)
    return kinds, *sharding, one.time.total, one.memory.needed


def layout(one: Candidate) -> tuple[int, ...]:
    """The degrees and the sharding; what else differs between plans is detail."""
    plan = one.plan
    return plan.tp, plan.cp, plan.pp, plan.ep, plan.zero


def best_of_each_layout(order: Iterable[Candidate]) -> list[Candidate]:
    firsts: dict[tuple[int, ...], Candidate] = {}
    for one in order:
        firsts.setdefault(layout(one), one)
    return list(firsts.values())


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
    group.add_argument(
        "--kernels", choices=get_args(Kernels), default="eager", help="what is fused (eager)"
    )

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
        a,
        args.gpus,
        per_node,
        args.seq_len,
        _sequences(args),
        args.precision,
        args.optimizer,
        args.kernels,
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
