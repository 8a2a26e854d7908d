"""A whole training or serving plan on G GPUs: what one GPU of it must hold, and how fast it is.

Replicas of tp·pp·cp GPUs each train on a sequence; the rest is data parallelism, G / (tp·pp·cp).
Context-parallel ranks hold the same weights, so ZeRO shards over them too; expert parallelism takes
its ranks from those of data parallelism (Megatron-LM's layout).
"""

import math
from dataclasses import dataclass

from distlab.errors import UsageError
from distlab.predict.activations import peak_activations
from distlab.predict.architecture import Architecture
from distlab.predict.compute import (
    experts_touched,
    forward_flops_per_token,
    roofline_seconds,
)
from distlab.predict.memory import DTYPE_BYTES, PRECISIONS, kv_bytes_per_token, model_state
from distlab.predict.params import (
    expert_parameters,
    layer_parameters,
    mlp_weights,
    rank_parameters,
    stage_layers,
    total_parameters,
)


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained: degrees, sharding (ZeRO stage; FSDP is 3), precision, batch.

    `chunks` are the layers' groups per pipeline stage (more than one: the interleaved schedule).
    `sequence_parallel` divides over tp what tensor parallelism alone leaves whole on every rank
    (Korthikanti et al., arXiv 2205.05198, section 4.2.2).
    """

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    precision: str = "mixed"
    optimizer: str = "adamw"
    seq_len: int = 4096
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    cp: int = 1
    ep: int = 1
    chunks: int = 1
    sequence_parallel: bool = False

    @property
    def data_parallel(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def shards(self) -> int:
        """The ranks that hold the same weights: those over which ZeRO shards."""
        return self.data_parallel * self.cp

    @property
    def tokens_per_step(self) -> int:
        return self.data_parallel * self.micro_batch * self.accumulation * self.seq_len


@dataclass(frozen=True)
class ServingPlan:
    """How a model is served: degrees, weight and cache types, `batch` sequences of `context`
    tokens per replica, `prefill_chunk` prompt tokens computed at once."""

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    precision: str = "bf16"
    kv_dtype: str = "bf16"
    batch: int = 1
    context: int = 4096
    prefill_chunk: int = 2048

    @property
    def replicas(self) -> int:
        return self.gpus // (self.tp * self.pp)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. `workspace` is what the parallelism itself needs on top of the
    `total`: see `_workspace`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv_cache: float
    workspace: float
    stage: int

    @property
    def total(self) -> float:
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.kv_cache))

    @property
    def needed(self) -> float:
        return self.total + self.workspace


def training_memory(a: Architecture, plan: TrainingPlan) -> Memory:
    """What training needs on the GPU that needs most, of all pipeline stages.

    Raises `UsageError` when the degrees do not fit the model or the number of GPUs.
    """
    check_degrees(a, plan.gpus, plan.tp, plan.pp, plan.cp, plan.ep)
    stages = (training_stage_memory(a, plan, stage) for stage in range(plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def training_stage_memory(a: Architecture, plan: TrainingPlan, stage: int) -> Memory:
    """What training needs on a GPU of one pipeline stage."""
    experts = expert_parameters(a, plan.tp, plan.pp, stage)
    shared = rank_parameters(a, plan.tp, plan.pp, stage) - experts
    dense = model_state(shared, plan.precision, plan.optimizer, plan.zero, plan.shards)
    routed = model_state(
        experts / plan.ep, plan.precision, plan.optimizer, plan.zero, plan.shards // plan.ep
    )
    activations = peak_activations(
        a, plan.precision, plan.seq_len // plan.cp, plan.micro_batch, plan.checkpointing,
        plan.tp, plan.pp, stage, plan.accumulation, plan.chunks, plan.sequence_parallel,
    )  # fmt: skip
    return Memory(
        weights=dense.weights + routed.weights,
        gradients=dense.gradients + routed.gradients,
        optimizer=dense.optimizer + routed.optimizer,
        activations=activations,
        kv_cache=0.0,
        workspace=_workspace(a, plan, stage),
        stage=stage,
    )


def serving_memory(a: Architecture, plan: ServingPlan) -> Memory:
    """What serving needs on the GPU that needs most; raises `UsageError` as `training_memory`."""
    check_degrees(a, plan.gpus, plan.tp, plan.pp)
    stages = (_serving_stage(a, plan, stage) for stage in range(plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def decode_step(
    a: Architecture, plan: ServingPlan, peak_flops: float, bandwidth: float
) -> tuple[float, float, float]:
    """FLOPs, bytes read per GPU, and least seconds of generating one token for each of the batch.

    The roofline over all stages one after the other: a pipeline adds memory, no speed, to a batch.
    The weights are read once per step (of the experts those that the batch needs), the cache once.
    """
    flops = plan.batch * forward_flops_per_token(a, plan.context)
    weights = _parameters_read(a, plan.batch) * DTYPE_BYTES[plan.precision] / plan.tp
    cache = plan.batch * plan.context * kv_bytes_per_token(a, plan.kv_dtype, plan.tp)
    seconds = roofline_seconds(flops / plan.tp, weights + cache, peak_flops, bandwidth)
    return flops, weights + cache, seconds


def check_degrees(a: Architecture, gpus: int, tp: int, pp: int, cp: int = 1, ep: int = 1) -> None:
    """Raise `UsageError`, naming the flag and what would do, where a degree cannot be."""
    parts = {
        "heads": a.num_attention_heads,
        "key-value heads": a.num_attention_heads if a.latent else a.num_key_value_heads,
        "columns of the MLP": a.intermediate_size,
    }
    for name, count in parts.items():
        if count % tp:
            usable = divisors(math.gcd(*parts.values()))
            raise UsageError(f"--tp {tp} does not divide {count} {name}; use {usable}")
    if pp > a.num_hidden_layers:
        raise UsageError(
            f"--pp {pp} is more than the model's {a.num_hidden_layers} layers; "
            f"use {a.num_hidden_layers} or fewer"
        )
    replica = tp * pp * cp
    if gpus % replica:
        degrees = f"--tp {tp} x --pp {pp}" + (f" x --cp {cp}" if cp > 1 else "")
        raise UsageError(
            f"--gpus {gpus} is no multiple of {degrees} = {replica}; "
            f"use --gpus {math.ceil(gpus / replica) * replica} or smaller degrees"
        )
    experts = a.experts.num_experts if a.experts else 1
    most = math.gcd(experts, gpus // replica)
    if most % ep:
        raise UsageError(
            f"--ep {ep} does not divide {experts} experts and {gpus // replica} data-parallel "
            f"ranks; use {divisors(most)}"
        )


def _workspace(a: Architecture, plan: TrainingPlan, stage: int) -> float:
    """Bytes that the parallelism itself needs: buffers that hold what other ranks have sent.

    ZeRO-3: two gathered blocks and one block's gradient. Sequence parallelism: the gathered hidden
    vectors of one block and their gradient. Context parallelism: the keys and values that arrive
    while those of the rank before are used.
    """
    compute = PRECISIONS[plan.precision].compute
    tokens = plan.micro_batch * plan.seq_len / plan.cp
    layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
    needed = 0.0
    if plan.zero == 3 and plan.shards > 1:
        kept = expert_parameters(a, plan.tp, plan.pp, stage) * (1 - 1 / plan.ep) / len(layers)
        block = layer_parameters(a, layers[-1]).per_rank(plan.tp) - kept
        needed += (min(len(layers), 2) + 1) * block * compute
    if plan.sequence_parallel and plan.tp > 1:
        needed += 2 * tokens * a.hidden_size * compute
    if plan.cp > 1:
        width = a.query_size + a.value_size if a.latent else 2 * a.key_value_size
        needed += 2 * tokens * width / plan.tp * compute
    return needed


def _serving_stage(a: Architecture, plan: ServingPlan, stage: int) -> Memory:
    layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
    weights = rank_parameters(a, plan.tp, plan.pp, stage) * DTYPE_BYTES[plan.precision]
    per_token = kv_bytes_per_token(a, plan.kv_dtype, plan.tp, len(layers))
    chunk = min(plan.prefill_chunk, plan.batch * plan.context)
    inner = (a.query_size + a.value_size + 2 * a.key_value_size + 3 * a.intermediate_size) / plan.tp
    activations = chunk * 2 * (4 * a.hidden_size + inner)
    if stage == plan.pp - 1:
        activations = max(activations, plan.batch * a.vocab_size * 4 / plan.tp)
    cache = plan.batch * plan.context * per_token
    return Memory(weights, 0.0, 0.0, activations, cache, 0.0, stage)


def _parameters_read(a: Architecture, tokens: int) -> float:
    """All parameters but the embedding's rows not looked up and the experts not needed."""
    read = float(total_parameters(a))
    if not a.tie_word_embeddings:
        read -= a.vocab_size * a.hidden_size
    if a.experts is not None:
        layer = a.num_hidden_layers - 1
        routed = mlp_weights(a, layer).divided - mlp_weights(a, layer, active=True).divided
        expert = routed / (a.experts.num_experts - a.experts.experts_per_token)
        idle = a.experts.num_experts - experts_touched(a, tokens)
        read -= idle * expert * (a.num_hidden_layers - a.experts.first_dense_layers)
    return read


def divisors(count: int) -> str:
    """The numbers that divide `count`, as words: 1, 2, 4 or 8."""
    found = [str(n) for n in range(1, count + 1) if count % n == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]
