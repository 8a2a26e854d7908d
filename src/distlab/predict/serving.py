"""A whole serving plan on G GPUs: what one GPU of it holds, how many tokens of cache are left, and
how fast it can be."""

from dataclasses import dataclass, replace

from distlab.predict.architecture import Architecture
from distlab.predict.compute import experts_touched, forward_flops_per_token, roofline_seconds
from distlab.predict.memory import DTYPE_BYTES, kv_bytes_per_token
from distlab.predict.params import (
    mlp_weights,
    rank_parameters,
    stage_layers,
    total_parameters,
)
from distlab.predict.plan import Memory, check_degrees
from distlab.predict.quantization import QUANTIZED, Quantization, quantized_parameters

SORT_BYTES = (
    4 + 8 + 8 + (4 + 8)
)  # values, their indices, the inverse's, and radix sort's second set
NON_TORCH_BYTES = 0.1 * 2**30
COMMUNICATOR_BYTES = {True: 1.3 * 2**30, False: 0.25 * 2**30}  # with NVLink, without


@dataclass(frozen=True)
class ServingPlan:
    """How a model is served: degrees, weight and cache types, `batch` sequences of `context` tokens
    per replica.

    `batched_tokens` and `max_sequences` are the largest batch that the engine makes room for when
    it starts: tokens of one pass, and sequences of which one samples. `quantization` describes the
    checkpoint's matrices where it is more than a name; `weight_bytes` are those of the whole
    checkpoint, where they were measured. `reserve`: bytes as `engine_reserve` counts them, if not
    its own; `nvlink`: whether the GPUs have it.
    """

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    precision: str = "bf16"
    kv_dtype: str = "bf16"
    batch: int = 1
    context: int = 4096
    batched_tokens: int = 2048
    max_sequences: int = 256
    quantization: Quantization | None = None
    weight_bytes: float | None = None
    reserve: float | None = None
    nvlink: bool = True

    @property
    def replicas(self) -> int:
        return self.gpus // (self.tp * self.pp)


def serving_memory(a: Architecture, plan: ServingPlan) -> Memory:
    """What serving needs on the GPU that needs most.

    Raises `UsageError` as `check_serving_plan`.
    """
    check_serving_plan(a, plan)
    a = with_a_head_for_each(a, plan.tp)
    stages = (_serving_stage(a, plan, stage) for stage in range(plan.pp))
    return max(stages, key=lambda memory: memory.needed)


def check_serving_plan(a: Architecture, plan: ServingPlan) -> None:
    """Raise `UsageError`, naming the flag and what would do, where a plan cannot be."""
    check_degrees(with_a_head_for_each(a, plan.tp), plan.gpus, plan.tp, plan.pp)


def with_a_head_for_each(a: Architecture, tp: int) -> Architecture:
    """The model as an engine divides it: key-value heads that are fewer than ranks are copied.

    Then every rank holds one head's weights and cache. What does not divide is left to
    `check_degrees`. Source: vLLM, `ModelConfig.get_num_kv_heads` and `QKVParallelLinear`.
    """
    copied = a.latent is None and tp > a.num_key_value_heads and tp % a.num_key_value_heads == 0
    if not copied or a.num_attention_heads % tp:
        return a
    return replace(a, num_key_value_heads=tp)


def cache_tokens(a: Architecture, plan: ServingPlan, limit: float) -> int:
    """How many tokens of cache a replica has where `limit` bytes of each GPU may be used.

    What weights and the reserve leave, on the GPU that has least. 0 where they leave nothing.
    """
    a, tokens = with_a_head_for_each(a, plan.tp), []
    for stage in range(plan.pp):
        held = _serving_stage(a, replace(plan, batch=0), stage)
        layers = len(stage_layers(a.num_hidden_layers, plan.pp, stage))
        per_token = kv_bytes_per_token(a, plan.kv_dtype, plan.tp, layers)
        tokens.append(max(0, int((limit - held.needed) / per_token)))
    return min(tokens)


def reserved_activations(a: Architecture, plan: ServingPlan, stage: int = 0) -> float:
    """Bytes that an engine leaves free for its largest batch: of the forward pass or of sampling.

    Forward: the hidden vectors and their residual, and the widest layer's vectors, of
    `batched_tokens` tokens; of a layer with experts, k copies of each token. Sampling: the logits
    of `max_sequences` sequences over the whole vocabulary, on every tensor-parallel rank, in the
    weights' precision and in float32, beside what top-p sampling needs to sort them: on CUDA torch
    sorts pairs of value and 64-bit index with cub's segmented radix sort, out of place. Together 38
    bytes for each logit of a 16-bit model; the hidden vectors are still there.
    Source: vLLM, `GPUModelRunner.profile_run` and `_dummy_sampler_run`; `apply_top_k_top_p`; torch,
    aten/src/ATen/native/cuda/SortStable.cu. Logs say 5.58 GiB for 1,024 sequences of 151,936 words
    and 1.40 GiB for 256 (tests/chapter01/test_published_runs.py), these formulas 5.5 and 1.4.
    """
    element = 4 if plan.precision == "fp32" else 2  # narrow weights have activations of 16 bits
    hidden = plan.batched_tokens * a.hidden_size * element
    attention = (a.query_size + a.value_size + 2 * a.key_value_size) / plan.tp
    widest = max(attention, *(_mlp_vectors(a, layer, plan.tp) for layer in _kinds(a, plan, stage)))
    forward = 2 * hidden + plan.batched_tokens * widest * element
    if stage < plan.pp - 1:
        return forward
    rows = max(plan.max_sequences, plan.batch)
    return max(forward, hidden + rows * a.vocab_size * (element + 4 + SORT_BYTES))


def default_batch(memory_bytes: float, device_name: str = "") -> tuple[int, int]:
    """The largest batch of vLLM's server where no flag says another: (tokens, sequences).

    Source: vLLM, `EngineArgs.get_batch_defaults`, usage context OPENAI_API_SERVER: more from 70 GiB
    on, but for A100s.
    """
    large = memory_bytes >= 70 * 2**30 and "a100" not in device_name.lower()
    return (8192, 1024) if large else (2048, 256)


def engine_reserve(plan: ServingPlan) -> float:
    """Bytes that a process takes beside what torch allocates, since the engine started.

    The kernels' workspaces, and with several GPUs the communicators: buffers of NCCL's channels
    and of the engine's own all-reduce. Taken from logs of vLLM: 0.03 to 0.26 GiB on one GPU; 1.38
    GiB on two H200 with NVLink, 0.30 GiB on two L40S without
    (tests/chapter01/test_published_runs.py). The CUDA context, another 0.5 GiB, is there before the
    engine measures: its share of the GPU does not count it. CUDA graphs (0.1 to 3 GiB) come after
    the cache and out of what the share leaves.
    """
    return NON_TORCH_BYTES + (COMMUNICATOR_BYTES[plan.nvlink] if plan.tp * plan.pp > 1 else 0.0)


def decode_step(
    a: Architecture, plan: ServingPlan, peak_flops: float, bandwidth: float
) -> tuple[float, float, float]:
    """FLOPs, bytes read per GPU, and least seconds of generating one token for each of the batch.

    The roofline over all stages one after the other: a pipeline adds memory, no speed, to a batch.
    The weights are read once per step (of the experts those that the batch needs), the cache once.
    """
    flops = plan.batch * forward_flops_per_token(a, plan.context)
    element = checkpoint_bytes(a, plan) / total_parameters(a)
    weights = _parameters_read(a, plan.batch) * element / plan.tp
    divided = with_a_head_for_each(a, plan.tp)
    cache = plan.batch * plan.context * kv_bytes_per_token(divided, plan.kv_dtype, plan.tp)
    seconds = roofline_seconds(flops / plan.tp, weights + cache, peak_flops, bandwidth)
    return flops, weights + cache, seconds


def checkpoint_bytes(a: Architecture, plan: ServingPlan) -> float:
    """Bytes of all weights, as measured or as their types say."""
    if plan.weight_bytes is not None:
        return plan.weight_bytes
    return _typed_bytes(a, plan, total_parameters(a), quantized_parameters(a, _types(plan)))


def _serving_stage(a: Architecture, plan: ServingPlan, stage: int) -> Memory:
    layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
    per_token = kv_bytes_per_token(a, plan.kv_dtype, plan.tp, len(layers))
    return Memory(
        weights=_rank_bytes(a, plan, stage),
        gradients=0.0,
        optimizer=0.0,
        activations=reserved_activations(a, plan, stage),
        kv_cache=plan.batch * plan.context * per_token,
        workspace=engine_reserve(plan) if plan.reserve is None else plan.reserve,
        stage=stage,
    )


def _rank_bytes(a: Architecture, plan: ServingPlan, stage: int) -> float:
    """The weights on one GPU; of a measured checkpoint, in proportion."""
    held = rank_parameters(a, plan.tp, plan.pp, stage)
    narrow = quantized_parameters(a, _types(plan), plan.tp, plan.pp, stage)
    computed = _typed_bytes(a, plan, held, narrow)
    if plan.weight_bytes is None:
        return computed
    whole = _typed_bytes(a, plan, total_parameters(a), quantized_parameters(a, _types(plan)))
    return computed * plan.weight_bytes / whole


def _typed_bytes(a: Architecture, plan: ServingPlan, parameters: float, narrow: float) -> float:
    types = _types(plan)
    if types is None:
        return parameters * DTYPE_BYTES[plan.precision]
    return narrow * types.bytes_per_element + (parameters - narrow) * DTYPE_BYTES["bf16"]


def _types(plan: ServingPlan) -> Quantization | None:
    return plan.quantization or QUANTIZED.get(plan.precision)


def _kinds(a: Architecture, plan: ServingPlan, stage: int) -> list[int]:
    """One layer of each kind on the stage: with experts, or without."""
    layers = stage_layers(a.num_hidden_layers, plan.pp, stage)
    return list({a.is_sparse(layer): layer for layer in layers}.values())


def _mlp_vectors(a: Architecture, layer: int, tp: int) -> float:
    """Elements per token that exist at once in an MLP: gate, up and their product; with experts the
    larger of a token's copies' hidden vectors and their gate and up, and the product."""
    gates = 2 if a.gated_mlp else 1
    if not a.is_sparse(layer) or a.experts is None:
        return (gates + 1) * a.intermediate_size / tp
    inner = a.experts.intermediate_size / tp
    return a.experts.experts_per_token * (max(gates * inner, a.hidden_size) + inner)


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
