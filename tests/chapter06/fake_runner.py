"""An engine without a model: the next token is a function of the prefix, read by the paged cache.

The cache keeps each token's id and position where a real one keeps its key and value. Whoever hands
out a block twice, copies too late, or forgets to compute a token is found at once: a prefix with a
wrong position raises, and one with a wrong token continues differently from `continuation`.
"""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from paged_engine.engine import Engine, EngineConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distlab.model import SIZES, Llama, save

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
    runner = FakeRunner(
        settings.num_blocks, settings.block_size, max_model_len, step_seconds, eos_bias
    )
    return Engine(settings, runner=runner, tokenizer=tiny_tokenizer())


class FakeRunner:
    """Stands for `paged_engine.runner.ModelRunner`; counts `steps` and the `tokens` computed."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int = 512,
        step_seconds: float = 0.0,
        eos_bias: float = -50.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.step_seconds = step_seconds
        self.block_bytes = block_size * 16
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.eos_token_ids = frozenset({END_OF_TEXT})
        self.description = "a fake runner"
        self.cache = np.full((num_blocks, block_size, 2), -1, dtype=np.int64)  # token, position
        self.table = _logits_table(eos_bias)
        self.steps = self.tokens = 0

    def execute(self, batch) -> Tensor:
        """Logits [chunks that sample, vocabulary], as `ModelRunner.execute`."""
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.steps += 1
        for source, target in batch.copies:
            self.cache[target] = self.cache[source]
        for chunk in batch.chunks:
            self._write(chunk)
        rows = [self._row(chunk) for chunk in batch.chunks if chunk.samples]
        return self.table[rows].clone()

    def _write(self, chunk) -> None:
        positions = np.arange(chunk.start, chunk.start + chunk.length)
        blocks = np.asarray(chunk.sequence.block_table)[positions // self.block_size]
        tokens = chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]
        self.cache[blocks, positions % self.block_size, 0] = tokens
        self.cache[blocks, positions % self.block_size, 1] = positions
        self.tokens += chunk.length

    def _row(self, chunk) -> int:
        end = chunk.start + chunk.length
        held = self.cache[chunk.sequence.block_table].reshape(-1, 2)[:end]
        if not np.array_equal(held[:, 1], np.arange(end)):
            raise AssertionError(f"the cache of {chunk.sequence} does not hold its prefix")
        return prefix_hash(held[:, 0])

    def close(self) -> None:
        pass


def prefix_hash(token_ids) -> int:
    """Which row of the table follows a prefix; every token and its place counts."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    mixed = (tokens + np.uint64(1)) * (places * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1))
    mixed ^= mixed >> np.uint64(29)
    return int((mixed * np.uint64(0xBF58476D1CE4E5B9)).sum() >> np.uint64(40)) % ROWS


def next_logits(token_ids: list[int], eos_bias: float = -50.0) -> Tensor:
    """Logits [vocabulary] after a prefix, without any engine."""
    return _logits_table(eos_bias)[prefix_hash(token_ids)]


def continuation(prompt_ids: list[int], count: int, eos_bias: float = -50.0) -> list[int]:
    """The greedy continuation of a prompt by at most `count` tokens, without any engine."""
    tokens, table = list(prompt_ids), _logits_table(eos_bias)
    while len(tokens) < len(prompt_ids) + count:
        tokens.append(int(table[prefix_hash(tokens)].argmax()))
        if tokens[-1] == END_OF_TEXT:
            break
    return tokens[len(prompt_ids) :]


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
