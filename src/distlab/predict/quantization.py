"""Weights of mixed types: which matrices of a quantized checkpoint are narrow, and how narrow.

Norms, embeddings and routers are never quantized, the output projection only where the checkpoint
says so: vLLM's and transformers' quantized layers replace linear ones alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distlab.errors import UsageError
from distlab.predict.architecture import Architecture
from distlab.predict.params import Split, attention_weights, mlp_weights, stage_layers


@dataclass(frozen=True)
class Quantization:
    """Bits of an element, and of what each `group` of elements adds: its scale and zero point.

    `ignored` are modules that stay as they are: parts of names, or regular expressions after "re:".
    """

    bits: float
    group: int = 1
    group_bits: float = 0.0
    ignored: tuple[str, ...] = ()
    output: bool = False  # whether the output projection is quantized, too

    @property
    def bytes_per_element(self) -> float:
        return (self.bits + self.group_bits / self.group) / 8

    def covers(self, module: str) -> bool:
        return not any(
            re.match(name[3:], module) if name.startswith("re:") else name in module
            for name in self.ignored
        )


# Usual checkpoints of these names: DeepSeek's blocks of 128 x 128 with a float32 scale; one scale
# per row; groups of 128 with a 16-bit scale and a 4-bit zero point (GPTQ, AWQ).
QUANTIZED = {
    "fp8": Quantization(8, 128 * 128, 32),
    "int8": Quantization(8),
    "int4": Quantization(4, 128, 20),
}


def quantized_parameters(
    a: Architecture, types: Quantization | None, tp: int = 1, pp: int = 1, stage: int | None = None
) -> float:
    """How many parameters are narrow, of a GPU of one pipeline stage, or (None) of all stages."""
    if types is None:
        return 0.0
    layers = range(a.num_hidden_layers)
    if stage is not None:
        layers = stage_layers(a.num_hidden_layers, pp, stage)
    found = Split(0)
    for layer in layers:
        for name, split in _matrices(a, layer):
            found += split if types.covers(name) else Split(0)
    if types.output and not a.tie_word_embeddings and stage in (None, pp - 1):
        found += Split(a.vocab_size * a.hidden_size)
    return found.per_rank(tp)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json's `quantization_config` says; None where it has none.

    Raises `UsageError` for a method that is not known, or numbers that are none.
    """
    content = config.get("quantization_config") or config.get("compression_config")
    if not content:
        return None
    if not isinstance(content, Mapping):
        raise UsageError("--config: quantization_config is no JSON object; use --precision")
    method = str(content.get("quant_method"))
    if method not in METHODS:
        raise UsageError(
            f"--config: quantization method {method!r} is not known; known are "
            f"{', '.join(sorted(METHODS))}; or give --precision"
        )
    try:
        return METHODS[method](content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"--config: quantization_config of {method} cannot be read ({error!r}); "
            f"give --precision"
        ) from error


def _fp8(content: Mapping[str, Any]) -> Quantization:
    rows, columns = content.get("weight_block_size") or (1, 1)
    scale = 32 if content.get("weight_block_size") else 0
    return Quantization(8, int(rows) * int(columns), scale, _ignored(content))


def _grouped(content: Mapping[str, Any]) -> Quantization:
    """GPTQ and AWQ: a 16-bit scale and a zero point as wide as an element, for each group."""
    bits, group = int(content["bits"]), int(content.get("group_size", 128))
    added = 16 + bits if group > 0 else 0
    output = bool(content.get("lm_head", False))
    return Quantization(bits, max(group, 1), added, _ignored(content), output)


def _bitsandbytes(content: Mapping[str, Any]) -> Quantization:
    if not content.get("load_in_4bit"):
        return Quantization(8, ignored=_ignored(content))
    scale = 8 if content.get("bnb_4bit_use_double_quant") else 32
    return Quantization(4, 64, scale, _ignored(content))


def _compressed_tensors(content: Mapping[str, Any]) -> Quantization:
    weights = next(iter(content["config_groups"].values()))["weights"]
    ignored = _ignored(content)
    bits, group = int(weights["num_bits"]), int(weights.get("group_size") or 1)
    added = 16 if group > 1 else 0
    return Quantization(bits, group, added, ignored, not any("lm_head" in name for name in ignored))


def _modelopt(content: Mapping[str, Any]) -> Quantization:
    """NVFP4: groups of 16 with an 8-bit scale (NVIDIA, "Introducing NVFP4", 2025); or FP8."""
    narrow = "FP4" in str(content.get("quant_algo", ""))
    return (
        Quantization(4, 16, 8, _ignored(content))
        if narrow
        else Quantization(8, ignored=_ignored(content))
    )


METHODS = {
    "fp8": _fp8,
    "gptq": _grouped,
    "awq": _grouped,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": lambda content: Quantization(4, 32, 8, _ignored(content)),
}


def _ignored(content: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
    return tuple(str(name) for key in keys for name in content.get(key) or ())


def _matrices(a: Architecture, layer: int) -> Iterator[tuple[str, Split]]:
    """The names and sizes of a layer's matrices, in Hugging Face's names; without the router."""
    block = f"model.layers.{layer}"
    if a.latent is None:
        sizes = {"q": a.query_size, "k": a.key_value_size, "v": a.key_value_size, "o": a.value_size}
        for name, size in sizes.items():
            yield f"{block}.self_attn.{name}_proj", Split(size * a.hidden_size)
    else:
        yield f"{block}.self_attn", attention_weights(a)
    if not a.is_sparse(layer) or a.experts is None:
        names = ("gate_proj", "up_proj", "down_proj") if a.gated_mlp else ("up_proj", "down_proj")
        for name in names:
            yield f"{block}.mlp.{name}", Split(a.intermediate_size * a.hidden_size)
        return
    shared = (3 if a.gated_mlp else 2) * a.hidden_size * a.experts.shared_intermediate_size
    yield f"{block}.mlp.experts", Split(mlp_weights(a, layer).divided - shared)
    if shared:
        yield f"{block}.mlp.shared_experts", Split(shared)
