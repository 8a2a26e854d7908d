"""An engine without a model, on the fake runner, with a tokenizer of one token for each byte."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distlab.model import SIZES, Llama, save
from fake_runner import FakeRunner, key_value, keys_values
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine

END_OF_TEXT = 0
VOCABULARY = 257  # every byte, and the end of a text
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ROWS = 4096
LETTERS = b"etaoinshrdlu "


def fake_engine(
    *, max_model_len: int = 512, step_seconds: float = 0.0, eos_bias: float = -50.0, **config
) -> Engine:
    """An engine on the tiny tokenizer; `config` as in `EngineConfig`.

    It rarely ends a text by itself; a larger `eos_bias` lets it. Each step lasts `step_seconds`
    more than it must.
    """
    sizes = {"model": "fake", "block_size": 4, "num_blocks": 256, "max_batch_tokens": 64, **config}
    settings = EngineConfig(**sizes, max_model_len=max_model_len)
    blocks = settings.num_blocks or 0
    runner = fake_runner(blocks, settings.block_size, max_model_len, step_seconds, eos_bias)
    return Engine(settings, runner=runner, tokenizer=tiny_tokenizer())


def fake_runner(
    num_blocks: int,
    block_size: int,
    max_model_len: int = 512,
    step_seconds: float = 0.0,
    eos_bias: float = -50.0,
) -> FakeRunner:
    table = _logits_table(eos_bias)
    return FakeRunner(num_blocks, block_size, max_model_len, table, step_seconds)


def next_logits(token_ids: list[int], eos_bias: float = -50.0) -> Tensor:
    """Logits [vocabulary] after a prefix, without any engine."""
    return _logits_table(eos_bias)[sum(keys_values(token_ids)) % ROWS]


def continuation(prompt_ids: list[int], count: int, eos_bias: float = -50.0) -> list[int]:
    """The greedy continuation of a prompt by at most `count` tokens, without any engine."""
    output: list[int] = []
    table = _logits_table(eos_bias)
    values = keys_values(prompt_ids)
    last, total = values[-1], sum(values)
    while len(output) < count:
        output.append(int(table[total % ROWS].argmax()))
        if output[-1] == END_OF_TEXT:
            break
        last = key_value(last, output[-1])
        total += last
    return output


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and a chat template of one line a message."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": END_OF_TEXT} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def random_model(directory: Path, seed: int = 0) -> Llama:
    """A tiny random Llama whose greedy texts vary, saved with the tiny tokenizer."""
    torch.manual_seed(seed)
    llama = Llama(replace(SIZES["smoke"], tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    save(llama, directory, tiny_tokenizer())
    return llama


@cache
def _logits_table(eos_bias: float) -> Tensor:
    """[rows, vocabulary]: noise, with letters likelier than other bytes."""
    noise = np.random.default_rng(6).standard_normal((ROWS, VOCABULARY), dtype=np.float32)
    letters = tiny_tokenizer().encode(LETTERS.decode())
    noise[:, letters] += 3
    noise[:, END_OF_TEXT] += eos_bias
    return torch.from_numpy(noise)
