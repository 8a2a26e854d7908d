"""What is in a model directory: its shape from config.json, and the tokens that end an answer.

Llama and its dense relatives: Mistral, Qwen2 (biases on queries, keys and values), Qwen3 (queries
and keys normalised per head). The weights themselves are read by `_loading_weights`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlab.errors import RunError, UsageError
from distlab.model_config import ModelConfig, config_from_json

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A model's shape, and what sets its architecture apart from plain Llama."""

    config: ModelConfig
    architecture: str
    dtype: torch.dtype  # what the file says
    max_length: int  # tokens of a sequence, prompt and output together
    qkv_bias: bool = False
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    head_norms: bool = False  # RMSNorm of each query and key head before the rotation


def read_shape(directory: str | Path) -> Shape:
    """The shape in `directory`/config.json.

    Raises `UsageError` when `directory` is no model directory, and `RunError` when its config.json
    is damaged or names an architecture that this engine does not have; one line each.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UsageError(f"{directory} is no model directory: it has no config.json; name one")
    try:
        return _shape(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is no readable model configuration: {error!r}") from error
    except UsageError as error:
        raise RunError(f"{path} describes a shape that cannot be: {error}") from error


def _shape(fields: Mapping[str, Any], path: Path) -> Shape:
    kind = fields.get("model_type")
    name = (fields.get("architectures") or [f"model_type {kind!r}"])[0]
    if ARCHITECTURES.get(name) != kind:
        known = ", ".join(ARCHITECTURES)
        raise RunError(f"{path}: architecture {name} is not supported; this engine has {known}")
    if fields.get("quantization_config"):
        raise RunError(f"{path}: quantized weights are not supported; use an unquantized model")
    defaults: dict[str, Any] = {"tie_word_embeddings": False}
    if kind == "qwen3":
        defaults["head_dim"] = 128
    dense = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    config = config_from_json({**defaults, **fields, **dense}, path)
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise RunError(f"{path}: dtype {dtype} is not supported, only {', '.join(DTYPES)}")
    attention_bias = bool(fields.get("attention_bias", False))
    return Shape(
        config=config,
        architecture=name,
        dtype=DTYPES[dtype],
        max_length=_max_length(fields, config),
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias and kind != "qwen2",
        mlp_bias=bool(fields.get("mlp_bias", False)),
        head_norms=kind == "qwen3",
    )


def _max_length(fields: Mapping[str, Any], config: ModelConfig) -> int:
    """Up to its sliding window, a model with one is a model without."""
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def eos_token_ids(directory: str | Path) -> frozenset[int]:
    """The tokens that end an answer: those of config.json and generation_config.json together."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise RunError(f"{path} is no readable configuration: {error!r}") from error
        found.update(told if isinstance(told, list) else [] if told is None else [told])
    return frozenset(found)


def check_split(config: ModelConfig, size: int) -> None:
    """Raises `UsageError` unless `size` processes can share the model's heads and columns."""
    counts = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    possible = [n for n in range(1, counts[1] + 1) if all(count % n == 0 for count in counts)]
    if size not in possible:
        raise UsageError(
            f"--tensor-parallel {size} does not divide {counts[0]} heads, {counts[1]} key-value "
            f"heads and {counts[2]} feed-forward columns; use {' or '.join(map(str, possible))}"
        )
