"""Reads a Hugging Face config.json into an `Architecture`, and its folder's weights' size."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlab.errors import UsageError
from distlab.predict.architecture import Architecture, Experts, LatentAttention

Config = Mapping[str, Any]


def read_config_json(place: str) -> Config:
    """The content of a config.json, or of the one in a model's directory.

    Raises `UsageError` about `--config` where there is none that can be read.
    """
    path = Path(place)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {place} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {place} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--config {place} holds no JSON object; use a config.json")
    return config


def read_architecture(place: str) -> Architecture:
    """The architecture of `read_config_json`; raises `UsageError` as `architecture_from_config`."""
    return architecture_from_config(read_config_json(place))


def measured_weight_bytes(place: str) -> float | None:
    """Bytes of the weights in a model's directory: its safetensors files, or their index.

    A file's header, some bytes for each tensor, counts as well. None where there are neither.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    index = folder / "model.safetensors.index.json"
    try:
        size = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return float(size) if isinstance(size, int) and size > 0 else None


def architecture_from_config(config: Config) -> Architecture:
    """The architecture of a config.json's content.

    Where a published config.json leaves a key out (head_dim, num_key_value_heads of a model
    without grouped heads, biases), it is read as transformers' Llama configuration reads it.

    Raises `UsageError` naming the model type, if it is none of `READERS`, or the key that is
    missing or is no number.
    """
    kind = config.get("model_type")
    if kind not in READERS:
        raise UsageError(
            f"--config: model type {kind!r} is not known; known are {', '.join(sorted(READERS))}"
        )
    return READERS[kind](config)


def _llama(config: Config, **options: Any) -> Architecture:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    return Architecture(
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", hidden // heads),
        max_position_embeddings=_size(config, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **options,
    )


def _llama_with_biases(config: Config) -> Architecture:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return _llama(config, qkv_bias=attention, output_bias=attention, mlp_bias=mlp)


def _qwen3(config: Config) -> Architecture:
    bias = bool(config.get("attention_bias"))
    head_dim = _size(config, "head_dim", 128)
    filled = {**config, "head_dim": head_dim}
    return _llama(filled, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _qwen3_moe(config: Config) -> Architecture:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UsageError(
            "--config: decoder_sparse_step and mlp_only_layers other than 1 and [] are not known"
        )
    experts = Experts(
        num_experts=_size(config, "num_experts", 128),
        experts_per_token=_size(config, "num_experts_per_tok", 8),
        intermediate_size=_size(config, "moe_intermediate_size", 768),
    )
    return replace(_qwen3(config), experts=experts)


def _mixtral(config: Config) -> Architecture:
    experts = Experts(
        num_experts=_size(config, "num_local_experts", 8),
        experts_per_token=_size(config, "num_experts_per_tok", 2),
        intermediate_size=_size(config, "intermediate_size"),
    )
    return _llama(config, experts=experts)


def _deepseek_v3(config: Config) -> Architecture:
    latent = LatentAttention(
        q_lora_rank=None if config.get("q_lora_rank", 1536) is None
        else _size(config, "q_lora_rank", 1536),
        kv_lora_rank=_size(config, "kv_lora_rank", 512),
        qk_nope_head_dim=_size(config, "qk_nope_head_dim", 128),
        qk_rope_head_dim=_size(config, "qk_rope_head_dim", 64),
        v_head_dim=_size(config, "v_head_dim", 128),
    )  # fmt: skip
    expert_size = _size(config, "moe_intermediate_size", 2048)
    experts = Experts(
        num_experts=_size(config, "n_routed_experts", 256),
        experts_per_token=_size(config, "num_experts_per_tok", 8),
        intermediate_size=expert_size,
        shared_intermediate_size=expert_size * _size(config, "n_shared_experts", 1, least=0),
        first_dense_layers=_size(config, "first_k_dense_replace", 3, least=0),
    )
    head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return _llama({**config, "head_dim": head_dim}, latent=latent, experts=experts)


def _gpt2(config: Config) -> Architecture:
    hidden, heads = _size(config, "n_embd", 768), _size(config, "n_head", 12)
    return Architecture(
        vocab_size=_size(config, "vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=_size(config, "n_inner", 4 * hidden),
        num_hidden_layers=_size(config, "n_layer", 12),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=_size(config, "n_positions", 1024),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        layer_norm=True,
        learned_positions=True,
        gated_mlp=False,
    )


READERS: dict[str, Callable[[Config], Architecture]] = {
    "llama": _llama_with_biases,
    "mistral": _llama,
    "qwen2": lambda config: _llama(config, qkv_bias=True),
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gpt2": _gpt2,
}


def _size(config: Config, key: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(
            f"--config: {key} is {value!r}; it must be a whole number of at least {least}"
        )
    return value
