"""Every way to divide a model's training over G GPUs, and why a way cannot be."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from distlab.predict import Architecture, TrainingPlan, stage_layers

MOST_CHUNKS = 8  # of a pipeline stage; more is not seen in practice
SHORTEST_PIECE = 4096  # tokens: with less the kernels get slow, which the cost model does not see
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
                for checkpointing in (False, True):
                    yield TrainingPlan(
                        job.gpus, d.tp, d.pp, zero, job.precision, job.optimizer, job.seq_len,
                        micro_batch, accumulation, checkpointing, d.cp, d.ep, chunks, d.tp > 1,
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


@cache
def stage_kinds(a: Architecture, pp: int) -> tuple[tuple[int, int], ...]:
    """The first stage of each kind, and how many of its kind there are.

    Stages differ by their layers, with experts and without, the first and the last by the
    embedding and the output. Of a kind the first holds most micro-batches, so most memory.
    """
    kinds: dict[tuple[int, int, bool, bool], list[int]] = {}
    for stage in range(pp):
        layers = stage_layers(a.num_hidden_layers, pp, stage)
        sparse = sum(a.is_sparse(layer) for layer in layers)
        kinds.setdefault((len(layers), sparse, stage == 0, stage == pp - 1), []).append(stage)
    return tuple((stages[0], len(stages)) for stages in kinds.values())


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
