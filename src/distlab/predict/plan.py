"""A whole training or serving plan on G GPUs: what one GPU of it must hold, and how fast it is.

Replicas of tp·pp GPUs each hold the model once; the rest is data parallelism, G / (tp·pp).
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
    layer_parameters,
    mlp_weights,
    rank_parameters,
    stage_layers,
    total_parameters,
)


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained: degrees, sharding (ZeRO stage; FSDP is 3), precision, batch."""

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

    @property
    def data_parallel(self) -> int:
        return self.gpus // (self.tp * self.pp)

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
    `total`: with ZeRO-3 two gathered blocks and one block's gradient."""

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
    check_degrees(a, plan.gpus, plan.tp, plan.pp)
    stages = (_training_stage(a, plan, stage) for stage in range(plan.pp))
    return max(stages, key=lambda memory: memory.needed)


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


def check_degrees(a: Architecture, gpus: int, tp: int, pp: int) -> None:
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
    if gpus % (tp * pp):
        nearest = math.ceil(gpus / (tp * pp)) * tp * pp
        raise UsageError(
            f"--gpus {gpus} is no multiple of --tp {tp} x --pp {pp} = {tp * pp}; "
            f"use --gpus {nearest} or smaller degrees"
        )


def _training_stage(a: Architecture, plan: TrainingPlan, stage: int) -> Memory:
    parameters = rank_parameters(a, plan.tp, plan.pp, stage)
    state = model_state(parameters, plan.precision, plan.optimizer, plan.zero, plan.data_parallel)
    activations = peak_activations(
        a, plan.precision, plan.seq_len, plan.micro_batch, plan.checkpointing,
        plan.tp, plan.pp, stage, plan.accumulation,
    )  # fmt: skip
    workspace = 0.0
    if plan.zero == 3 and plan.data_parallel > 1:
        layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
        block = layer_parameters(a, layers[-1]).per_rank(plan.tp)
        blocks = min(len(layers), 2) + 1
        workspace = blocks * block * PRECISIONS[plan.precision].compute
    return Memory(
        state.weights, state.gradients, state.optimizer, activations, 0.0, workspace, stage
    )


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
