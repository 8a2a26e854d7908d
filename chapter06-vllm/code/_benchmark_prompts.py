"""Prompts as token ids: pieces of real text, the same ones for every engine."""

import random
from pathlib import Path

from distlab.data.corpus import read_corpus

TEXT_BYTES = 400_000
SPREAD = 0.6  # lengths go from 0.4 to 1.6 times the average


class Prompts:
    """Windows of the standard library's sources, in the tokens of the model at `model`.

    A `key` chooses the windows: another key, other prompts, the same ones in every run.
    """

    def __init__(self, model: Path, vocab_size: int, seed: int) -> None:
        from transformers import AutoTokenizer
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()  # it warns that the text is longer than the model's context
        text = "\n".join(read_corpus("stdlib", TEXT_BYTES))
        ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
        self._tokens = [token for token in ids if token < vocab_size]
        self._seed = seed

    def mixed(self, count: int, average: int, key: str) -> list[list[int]]:
        """`count` prompts, their lengths uniform around `average`."""
        chance = random.Random(f"{self._seed} {key}")
        least, most = round(average * (1 - SPREAD)), round(average * (1 + SPREAD))
        return [self._window(chance, chance.randint(max(1, least), most)) for _ in range(count)]

    def shared(self, count: int, common: int, own: int, key: str) -> list[list[int]]:
        """`count` prompts that begin with the same `common` tokens, then have `own` each."""
        chance = random.Random(f"{self._seed} {key}")
        beginning = self._window(chance, common)
        return [beginning + self._window(chance, own) for _ in range(count)]

    def _window(self, chance: random.Random, length: int) -> list[int]:
        start = chance.randrange(len(self._tokens) - length)
        return self._tokens[start : start + length]
