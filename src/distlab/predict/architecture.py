"""What the formulas need to know about a decoder-only transformer: its sizes, and nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention, in which the cache holds one compressed vector per token.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. `q_lora_rank` None: queries are not
    compressed.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense MLP of every layer after `first_dense_layers`.

    Each token meets `experts_per_token` of the `num_experts` routed experts, and the shared one,
    whose intermediate size is `shared_intermediate_size` (0: there is none).
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    first_dense_layers: int = 0


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer, in Hugging Face's field names.

    The defaults describe the Llama block: RMSNorm, rotary positions, no biases, a gated (SwiGLU)
    MLP of three matrices. GPT-2's is had by `layer_norm`, `learned_positions`, `mlp_bias`,
    `gated_mlp=False` and both attention biases.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False
    learned_positions: bool = False
    gated_mlp: bool = True
    latent: LatentAttention | None = None
    experts: Experts | None = None

    @property
    def query_size(self) -> int:
        """Elements of all heads' queries of one token; of the scores' inner dimension, that is."""
        if self.latent is None:
            return self.num_attention_heads * self.head_dim
        head_dim = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
        return self.num_attention_heads * head_dim

    @property
    def value_size(self) -> int:
        """Elements of all heads' outputs of one token, before the output projection."""
        if self.latent is None:
            return self.query_size
        return self.num_attention_heads * self.latent.v_head_dim

    @property
    def key_value_size(self) -> int:
        """Elements of the keys, and again of the values, of one token (fewer than heads: GQA)."""
        return self.num_key_value_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has experts in place of its dense MLP."""
        return self.experts is not None and layer >= self.experts.first_dense_layers
