"""What is in a model directory: its shape, its end tokens, its tokenizer and its weights.

Llama and its dense relatives: Mistral, Qwen2 (biases on queries, keys and values), Qwen3 (queries
and keys normalised per head).

Matrices that read the same input are joined into one (queries, keys and values; gate and up), so
that a layer makes four products instead of seven. With tensor parallelism each process holds its
part alone: whole heads, a slice of the feed-forward columns, a slice of the vocabulary
(Shoeybi et al. 2019, section 3).
"""

import json
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlab.errors import RunError, UsageError
from distlab.hf_format import read_tensors
from distlab.model_config import ModelConfig, config_from_json

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HARMLESS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # old files repeat constants
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


log = logging.getLogger("paged_engine.loading")


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
    # Mistral has no such switch; a Qwen's is off where its file does not speak of it.
    switched_on = fields.get("use_sliding_window", fields["model_type"] == "mistral")
    window = fields.get("sliding_window") if switched_on else None
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


def load_tokenizer(directory: str | Path) -> Any:
    """Transformers' tokenizer of a model directory; None if it has no tokenizer.

    Raises:
        RunError: its files are damaged.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # a second or two, and not needed for token ids

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None
) -> list[int]:
    """The token ids of a conversation, up to the answer's beginning.

    The template is the model's own without a `template`: of several, the one named default.

    Raises:
        UsageError: the template refuses the messages, or is none; its cause is Jinja's error. Or a
            message is no text.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"The chat template refuses these messages: {error}") from error
    return text_ids(tokenizer, text, add_special_tokens=False)  # the template has written them


def text_ids(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text. Raises `UsageError` for half of a surrogate pair, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has half of a surrogate pair, U+{ord(text[error.start]):04X}, as its "
            f"character {error.start}: no UTF-8 can say that; send a whole character"
        ) from None
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def plain_ids(prompt: Any) -> list[int]:
    """Token ids as Python's integers: of a list, a tuple, or an array of integers of one dimension.

    Raises `UsageError` for what is no integer; a number like 1.5 is not cut.
    """
    try:
        ids = list(prompt)
    except TypeError:
        raise UsageError(f"prompt {prompt!r} is no text and no list of token ids") from None
    try:
        if not any(isinstance(token, bool) for token in ids):
            return [operator.index(token) for token in ids]
    except TypeError:
        pass
    wrong = next(token for token in ids if isinstance(token, bool) or not _is_index(token))
    raise UsageError(f"token id {wrong!r} is no integer; give a list of integers, such as [1, 5]")


def _is_index(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class Part:
    """Which part of each layer one process holds: `rank` of `size`, all of it by default."""

    rank: int = 0
    size: int = 1

    def of(self, total: int) -> slice:
        """This part of `total` rows or columns, which `size` must divide."""
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass
class LayerWeights:
    """One layer's weights, joined and cut to a process's part; [out, in] as in torch's Linear."""

    input_norm: Tensor
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None
    output: Tensor  # [hidden, heads * head_dim]
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor  # [2 * intermediate, hidden], gate first
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor  # [vocab or its part, hidden]; the embedding itself where the two are tied


def load_weights(
    directory: str | Path,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    part: Part | None = None,
) -> Weights:
    """Read the weights of `directory`, in `dtype` on `device`; only `part` of each layer's.

    Raises `RunError`, in one line, when a file is cut short, or a tensor is missing, has another
    shape than config.json says, or is unknown to the architecture.
    """
    expected = _expected(shape)
    tensors, untied = {}, None
    for name, tensor in read_tensors(directory):
        if name.endswith(HARMLESS):
            continue
        if name == HEAD and name not in expected:
            untied = tensor  # a copy of the embedding, or a matrix of its own
            continue
        if name not in expected:
            raise RunError(f"{directory}: {name} has no place in a {shape.architecture}")
        if tuple(tensor.shape) != expected[name]:
            raise RunError(
                f"{directory}: {name} is {tuple(tensor.shape)}, its config.json asks for "
                f"{expected[name]}"
            )
        tensors[name] = tensor
    missing = next((name for name in expected if name not in tensors), None)
    if missing is not None:
        raise RunError(f"{directory}: {missing} is missing from its safetensors files")
    if untied is not None and not torch.equal(untied, tensors[EMBEDDING]):
        log.warning(
            "%s: config.json ties the output matrix to the embedding, but the file has two "
            "different ones; both are used, as transformers does",
            directory,
        )
        tensors[HEAD] = untied
    return _Joiner(tensors, shape, dtype, device, part or Part()).weights()


def _expected(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that the architecture has."""
    config, head = shape.config, shape.config.dim_per_head
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = {
        "self_attn.q_proj": (queries, hidden, shape.qkv_bias),
        "self_attn.k_proj": (keys, hidden, shape.qkv_bias),
        "self_attn.v_proj": (keys, hidden, shape.qkv_bias),
        "self_attn.o_proj": (hidden, queries, shape.output_bias),
        "mlp.gate_proj": (inner, hidden, shape.mlp_bias),
        "mlp.up_proj": (inner, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, inner, shape.mlp_bias),
    }
    vectors = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if shape.head_norms:
        vectors |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in matrices.items():
            found[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                found[f"{prefix}{name}.bias"] = (rows,)
        found |= {f"{prefix}{name}.weight": (size,) for name, size in vectors.items()}
    found["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, hidden)
    return found


class _Joiner:
    """Cuts the tensors of a checkpoint to one part, joins them, and lets go of what it used."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        part: Part,
    ) -> None:
        self.tensors, self.shape, self.part = tensors, shape, part
        self.device, self.dtype = device, dtype

    def weights(self) -> Weights:
        config = self.shape.config
        embedding = self.whole(EMBEDDING)
        head = self.whole(HEAD) if HEAD in self.tensors else embedding
        layers = [self.layer(index) for index in range(config.num_hidden_layers)]
        return Weights(embedding, layers, self.whole("model.norm.weight"), self.vocabulary(head))

    def layer(self, index: int) -> LayerWeights:
        prefix, shape = f"model.layers.{index}.", self.shape
        qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        gate_up = [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")]
        output, down = f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"
        adds = self.part.rank == 0  # the parts' outputs are summed, so one of them adds the bias
        norms = [
            self.whole(f"{prefix}self_attn.{name}_norm.weight") if shape.head_norms else None
            for name in "qk"
        ]
        return LayerWeights(
            input_norm=self.whole(f"{prefix}input_layernorm.weight"),
            qkv=self.rows([f"{name}.weight" for name in qkv]),
            qkv_bias=self.rows([f"{name}.bias" for name in qkv]) if shape.qkv_bias else None,
            query_norm=norms[0],
            key_norm=norms[1],
            output=self.columns(f"{output}.weight"),
            output_bias=self.whole(f"{output}.bias") if shape.output_bias and adds else None,
            mlp_norm=self.whole(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.rows([f"{name}.weight" for name in gate_up]),
            gate_up_bias=self.rows([f"{name}.bias" for name in gate_up])
            if shape.mlp_bias
            else None,
            down=self.columns(f"{down}.weight"),
            down_bias=self.whole(f"{down}.bias") if shape.mlp_bias and adds else None,
        )

    def whole(self, name: str) -> Tensor:
        return self.tensors.pop(name).to(self.device, self.dtype)

    def rows(self, names: list[str]) -> Tensor:
        """The part's outputs of several matrices (or biases), below each other."""
        taken = [self.tensors.pop(name) for name in names]
        return torch.cat([t[self.part.of(t.shape[0])] for t in taken]).to(self.device, self.dtype)

    def columns(self, name: str) -> Tensor:
        """The part's inputs of a matrix."""
        taken = self.tensors.pop(name)
        return taken[:, self.part.of(taken.shape[1])].to(self.device, self.dtype).contiguous()

    def vocabulary(self, head: Tensor) -> Tensor:
        """The part's rows of the output matrix, padded with zeros to the same count for all."""
        if self.part.size == 1:
            return head
        each = -(-head.shape[0] // self.part.size)
        mine = head[self.part.rank * each : (self.part.rank + 1) * each]
        return torch.nn.functional.pad(mine, (0, 0, 0, each - mine.shape[0]))
