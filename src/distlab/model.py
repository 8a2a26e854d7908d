"""One decoder of the Llama architecture, whose saved directory is an ordinary Hugging Face one.

Parameter names are those of transformers' `LlamaForCausalLM`, so that vLLM, SGLang and transformers
serve what the training chapters trained. Source: Touvron et al. 2023, section 2.2; the parts of a
layer, with their sources, are in `distlab.layers`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distlab import hf_format
from distlab.errors import RunError
from distlab.layers import Attention, FeedForward, KVCache, RMSNorm, rope_tables
from distlab.model_config import (
    SIZES,
    Llama3Rope,
    ModelConfig,
    add_model_flags,
    config_from_args,
    config_to_json,
    read_config,
)
from distlab.predict.params import total_parameters

__all__ = [
    "SIZES",
    "KVCache",
    "Llama",
    "Llama3Rope",
    "ModelConfig",
    "add_model_flags",
    "config_from_args",
    "load",
    "model_from_args",
    "num_parameters",
    "read_config",
    "save",
]


class Llama(nn.Module):
    """The decoder with its output layer.

    `gradient_checkpointing` recomputes each layer in the backward pass instead of keeping its
    activations. `loss_chunks` above 1 computes the loss in that many pieces, so that only one
    piece's logits exist at a time; it costs one more product with the output matrix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.loss_chunks = 1
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, seq, vocab] of `input_ids` [batch, seq]; with `targets`, the mean loss.

        With a `cache` the tokens follow those already in it, and are added to it. The loss goes
        through forward, so that DDP, FSDP and torch.compile, which wrap forward, see it:
        `wrapped(input_ids, targets=targets)`.
        """
        hidden = self.model(input_ids, cache, self.gradient_checkpointing)
        return self.lm_head(hidden) if targets is None else self._mean_loss(hidden, targets)

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32, of predicting `targets` [batch, seq]."""
        return self(input_ids, targets=targets)

    def _mean_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if self.loss_chunks == 1:
            return F.cross_entropy(self.lm_head(hidden).float(), targets)
        pieces = zip(hidden.chunk(self.loss_chunks), targets.chunk(self.loss_chunks), strict=True)
        losses = [checkpoint(self._summed_loss, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum() / targets.numel()

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="sum")

    def next_logits(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [batch, vocab] of the token after `input_ids`, which are added to `cache`."""
        return self.lm_head(self.model(input_ids, cache)[:, -1])

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`input_ids` [batch, seq] and `max_new_tokens` more: the likeliest, or sampled ones.

        With `temperature` above 0 tokens are drawn, using `generator`.
        """
        batch, length = input_ids.shape
        weight = self.lm_head.weight
        room = length + max_new_tokens
        cache = KVCache(self.config, batch, room, weight.device, weight.dtype)
        tokens, step = input_ids, input_ids
        for _ in range(max_new_tokens):
            step = choose_token(self.next_logits(step, cache), temperature, generator)
            tokens = torch.cat([tokens, step], dim=1)
        return tokens

    def reset_parameters(self) -> None:
        """N(0, 0.02), and 0.02 / sqrt(2 layers) where an output joins the residual stream.

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        for name, parameter in self.named_parameters():
            self.initialise(name, parameter)

    def initialise(self, name: str, parameter: Tensor) -> None:
        """Draw the values of one parameter, which need not be the model's own tensor."""
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Decoder(nn.Module):
    """Embedding, layers and the last normalisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, checkpointing: bool = False
    ) -> Tensor:
        """Hidden states [batch, seq, hidden] of `input_ids` [batch, seq]."""
        x = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(x.device.type):  # keep the residual stream narrow too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        start = 0 if cache is None else cache.length
        rope = rope_tables(self.config, start, input_ids.shape[1], x.device, x.dtype)
        for layer in self.layers:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def choose_token(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token [batch, 1] from `logits` [batch, vocab]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def num_parameters(model: nn.Module | ModelConfig) -> int:
    """Weights in all; a tied one counts once."""
    if isinstance(model, ModelConfig):
        return total_parameters(model.architecture)
    return sum(parameter.numel() for parameter in model.parameters())


def save(
    model: Llama, directory: str | Path, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write `model` as a Hugging Face directory; see `hf_format.write_directory`."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return hf_format.write_directory(
        directory, config_to_json(model.config), tensors, tokenizer, overwrite
    )


def load(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """Read a Hugging Face directory of the Llama architecture, from safetensors only.

    Raises `UsageError` when `directory` is no model folder, and `RunError`, in one line, when its
    files are damaged or describe another architecture.
    """
    config = read_config(directory)
    with torch.device("meta"):
        model = Llama(config)
    tensors = {
        name: tensor.to(device, dtype, copy=True)
        for name, tensor in hf_format.read_tensors(directory)
    }
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != tuple(shape):
            raise RunError(
                f"{directory}: {name} is {found}, its config.json asks for {tuple(shape)}"
            )
    model.load_state_dict({name: tensors[name] for name in expected}, strict=False, assign=True)
    model.tie_weights()
    return model


def model_from_args(
    args: argparse.Namespace, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Llama:
    """The model that the flags of `add_model_flags` ask for: new, or the saved one's weights."""
    config = config_from_args(args)
    if args.model not in SIZES:
        return load(args.model, device, dtype)
    with torch.device(device):
        return Llama(config).to(dtype)
