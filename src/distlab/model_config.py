"""The shape of a Llama-architecture model: its fields, three ready sizes, and their flags."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distlab.errors import RunError, UsageError
from distlab.predict import Architecture
from distlab.predict.plan import divisors
from distlab.script import positive_int

OVERRIDES = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary wavelengths to longer contexts (its config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, in the field names of Hugging Face's `LlamaConfig`.

    `head_dim` None means hidden_size / num_attention_heads. Raises `UsageError` for a shape that
    cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_scaling: Llama3Rope | None = None

    def __post_init__(self) -> None:
        hidden, heads, kv_heads = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        if self.head_dim is None and hidden % heads:
            raise UsageError(
                f"--heads {heads} does not divide --hidden-size {hidden}; "
                f"use a multiple of {heads}, such as --hidden-size {-(-hidden // heads) * heads}"
            )
        if self.dim_per_head % 2:
            raise UsageError(
                f"--heads {heads} gives heads of {self.dim_per_head} dimensions, and rotary "
                f"embeddings need an even number; use --hidden-size {2 * hidden} or other --heads"
            )
        if heads % kv_heads:
            raise UsageError(
                f"--kv-heads {kv_heads} does not divide --heads {heads}; use {divisors(heads)}"
            )

    @property
    def dim_per_head(self) -> int:
        """The dimensions of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def architecture(self) -> Architecture:
        """What the formulas of `distlab.predict` need to know of this shape."""
        return Architecture(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.dim_per_head,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
        )


SIZES = {
    "smoke": ModelConfig(512, 64, 176, 2, 4, 2),
    "laptop": ModelConfig(4096, 256, 688, 3, 8, 4),
    "gpu": ModelConfig(32768, 1536, 4096, 12, 12, 4),
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model and the flags that change its shape; read them with `config_from_args`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="SIZE|DIR",
        default="laptop",
        help="smoke (0.1 M parameters), laptop (3 M), gpu (350 M), or a saved model's folder",
    )
    for flag, field in OVERRIDES.items():
        group.add_argument(
            f"--{flag.replace('_', '-')}",
            type=positive_int,
            metavar="N",
            help=f"{field.replace('_', ' ')} instead of the size's own",
        )


def config_from_args(args: argparse.Namespace) -> ModelConfig:
    """The shape that the flags of `add_model_flags` describe.

    Raises `UsageError` for an unknown size, a folder without a model, or a shape that cannot be.
    """
    changes = {
        field: value
        for flag, field in OVERRIDES.items()
        if (value := getattr(args, flag, None)) is not None
    }
    if args.model not in SIZES:
        config = read_config(args.model, flag="--model")
        if changes:
            flag = next(flag for flag, field in OVERRIDES.items() if field in changes)
            raise UsageError(
                f"--{flag.replace('_', '-')} cannot change the saved model {args.model}; "
                f"leave it out, or use --model {', '.join(SIZES)}"
            )
        return config
    base = SIZES[args.model]
    if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
        changes["num_key_value_heads"] = math.gcd(
            changes["num_attention_heads"], base.num_key_value_heads
        )
    if "hidden_size" in changes:
        grown = base.intermediate_size * changes["hidden_size"] / base.hidden_size
        changes["intermediate_size"] = max(16, round(grown / 16) * 16)
    return replace(base, **changes)


def read_config(directory: str | Path, flag: str = "") -> ModelConfig:
    """The shape in `directory`/config.json, a Hugging Face Llama configuration.

    Raises `UsageError`, naming `flag`, when there is no such file, and `RunError` when it cannot be
    read or describes another architecture.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        sizes = f" and no size; use {', '.join(SIZES)}, or a folder" if flag else "; name a folder"
        raise UsageError(
            f"{flag} {directory} is no model folder{sizes} with a config.json".lstrip()
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return config_from_json(fields, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is no readable Llama configuration: {error!r}") from error
    except UsageError as error:
        raise RunError(f"{path} describes a shape that cannot be: {error}") from error


def config_from_json(fields: Mapping[str, Any], source: object) -> ModelConfig:
    """The shape in a Hugging Face config.json's fields; `RunError` for what is not plain Llama."""
    if fields.get("model_type") != "llama":
        raise RunError(f"{source}: model_type {fields.get('model_type')!r} is not llama")
    for name, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if fields.get(name, plain) != plain:
            raise RunError(f"{source}: {name} {fields[name]!r} is not supported, only {plain!r}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    heads = fields["num_attention_heads"]
    sizes = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise RunError(f"{source}: {name} {size!r} is no whole number of at least 1")
    return ModelConfig(
        **sizes,
        head_dim=fields.get("head_dim"),
        max_position_embeddings=fields.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        rope_scaling=_rope_scaling(rope, source),
    )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5, vLLM and SGLang read."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **asdict(config.rope_scaling)}
    return {
        **asdict(config),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.dim_per_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_scaling": None if config.rope_scaling is None else rope,
    }


def _rope_scaling(rope: Mapping[str, Any], source: object) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise RunError(f"{source}: rope_type {kind!r} is not supported, only default and llama3")
    return Llama3Rope(**{name: rope[name] for name in Llama3Rope.__dataclass_fields__})
