"""How many parameters a transformer has, in all, per token, and on one GPU.

Each count is a `Split`: what tensor parallelism divides over its ranks, and what every rank keeps
whole (Megatron-LM, arXiv 1909.08053, section 3: the matrices are divided by columns, then by
rows; norms, routers and the biases added after the row-parallel sum are not).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from distlab.predict.architecture import Architecture, LatentAttention


@dataclass(frozen=True)
class Split:
    """Elements (or bytes) that tensor parallelism divides, and those that every rank holds."""

    divided: float
    replicated: float = 0

    def __add__(self, other: "Split") -> "Split":
        return Split(self.divided + other.divided, self.replicated + other.replicated)

    def __mul__(self, factor: float) -> "Split":
        return Split(self.divided * factor, self.replicated * factor)

    def per_rank(self, tp: int) -> float:
        return self.divided / tp + self.replicated

    @property
    def total(self) -> float:
        return self.divided + self.replicated


def total_parameters(a: Architecture) -> int:
    """All parameters: V·H + L·(attention + MLP + norms) + norm + V·H unless tied."""
    return int(_embedding(a).total + _all_layers(a) + _head(a).total)


def active_parameters(a: Architecture) -> int:
    """The parameters that one token meets: of the routed experts only its k, all else in full.

    Source: Mixtral (arXiv 2401.04088), section 2.1, "active parameters".
    """
    return int(_embedding(a).total + _all_layers(a, active=True) + _head(a).total)


def matmul_parameters(a: Architecture) -> int:
    """The elements of the weight matrices that one token is multiplied with.

    Without the embedding table, whose rows are looked up, and without norms and biases, which do
    no matrix product; with the output projection, also when it is the tied embedding table.
    """
    layers = sum(
        attention_weights(a).total + mlp_weights(a, layer, active=True).total
        for layer in range(a.num_hidden_layers)
    )
    return int(layers) + a.vocab_size * a.hidden_size


@lru_cache(maxsize=4096)
def rank_parameters(a: Architecture, tp: int = 1, pp: int = 1, stage: int = 0) -> float:
    """The parameters on one GPU of pipeline stage `stage` (from 0), before any data sharding.

    The first stage has the embedding, the last the final norm and the output projection; a tied
    table stands on both (Megatron-LM, section 3). The vocabulary is padded to a multiple of tp.
    """
    first, last = stage == 0, stage == pp - 1
    split = Split(0)
    for layer in stage_layers(a.num_hidden_layers, pp, stage):
        split += layer_parameters(a, layer)
    if first:
        split += _embedding(a, tp)
    if last:
        split += _head(a, tp)
        if a.tie_word_embeddings and not first:
            split += _table(a, tp)
    return split.per_rank(tp)


@lru_cache(maxsize=4096)
def expert_parameters(a: Architecture, tp: int = 1, pp: int = 1, stage: int = 0) -> float:
    """The routed experts' part of `rank_parameters`, which expert parallelism divides further."""
    if a.experts is None:
        return 0.0
    layers = stage_layers(a.num_hidden_layers, pp, stage)
    matrix = (3 if a.gated_mlp else 2) * a.hidden_size
    routed = matrix * a.experts.num_experts * a.experts.intermediate_size
    return routed * sum(a.is_sparse(layer) for layer in layers) / tp


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """The layers of a pipeline stage; the first stages take one more where pp does not divide."""
    size, extra = divmod(num_layers, pp)
    start = stage * size + min(stage, extra)
    return range(start, start + size + (stage < extra))


def layer_parameters(a: Architecture, layer: int, active: bool = False) -> Split:
    """The parameters of one block, those that one token meets if `active`."""
    split = attention_weights(a) + mlp_weights(a, layer, active) + Split(0, 2 * _norm(a))
    if a.qkv_bias:
        split += Split(a.query_size + 2 * a.key_value_size)
    if a.output_bias:
        split += Split(0, a.hidden_size)
    if a.qk_norm:
        split += Split(0, 2 * a.head_dim)
    if a.latent is not None:
        split += Split(0, (a.latent.q_lora_rank or 0) + a.latent.kv_lora_rank)  # their norms
    if a.mlp_bias:
        split += Split((2 if a.gated_mlp else 1) * a.intermediate_size, a.hidden_size)
    return split


def attention_weights(a: Architecture) -> Split:
    """The matrices of attention: H·(Q + 2·KV) + Q·H; for latent attention, its projections.

    Source: GQA (arXiv 2305.13245), section 2.2; MLA: DeepSeek-V2 (arXiv 2405.04434), eq. 9-17.
    """
    output = Split(a.value_size * a.hidden_size)
    if a.latent is not None:
        return _latent_projections(a, a.latent) + output
    return Split(a.hidden_size * (a.query_size + 2 * a.key_value_size)) + output


def mlp_weights(a: Architecture, layer: int, active: bool = False) -> Split:
    """The matrices of the layer's MLP: 3·H·I gated (SwiGLU), 2·H·I not; experts and router.

    Source: GLU variants (arXiv 2002.05202), eq. 5; experts: Mixtral, section 2.1.
    """
    matrix = (3 if a.gated_mlp else 2) * a.hidden_size
    if not a.is_sparse(layer) or a.experts is None:
        return Split(matrix * a.intermediate_size)
    e = a.experts
    routed = (e.experts_per_token if active else e.num_experts) * e.intermediate_size
    router = a.hidden_size * e.num_experts
    return Split(matrix * (routed + e.shared_intermediate_size), router)


def _latent_projections(a: Architecture, latent: LatentAttention) -> Split:
    """Down-projections are small and replicated; the up-projections are divided by heads."""
    up_kv = a.num_attention_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    down = a.hidden_size * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    if latent.q_lora_rank is None:
        return Split(a.hidden_size * a.query_size + latent.kv_lora_rank * up_kv, down)
    return Split(
        latent.q_lora_rank * a.query_size + latent.kv_lora_rank * up_kv,
        down + a.hidden_size * latent.q_lora_rank,
    )


def _all_layers(a: Architecture, active: bool = False) -> float:
    return sum(layer_parameters(a, layer, active).total for layer in range(a.num_hidden_layers))


def _embedding(a: Architecture, tp: int = 1) -> Split:
    positions = a.max_position_embeddings * a.hidden_size if a.learned_positions else 0
    return _table(a, tp) + Split(0, positions)


def _head(a: Architecture, tp: int = 1) -> Split:
    table = Split(0) if a.tie_word_embeddings else _table(a, tp)
    return table + Split(0, _norm(a))


def _table(a: Architecture, tp: int = 1) -> Split:
    return Split(math.ceil(a.vocab_size / tp) * tp * a.hidden_size)


def _norm(a: Architecture) -> int:
    return (2 if a.layer_norm else 1) * a.hidden_size
