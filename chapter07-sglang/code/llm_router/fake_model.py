"""Words as tokens, and a cache of their blocks: what fake workers and simulations share."""

import struct
import zlib
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any

import orjson

WORDS = 1000


SPECIAL = {"<system>": WORDS, "<user>": WORDS + 1, "<assistant>": WORDS + 2}
UNKNOWN = WORDS + 3
MOST_HASH = 2**64 - 1  # a block's name has no sign
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


VOCABULARY = {f"w{i}": i for i in range(WORDS)} | SPECIAL | {"<unknown>": UNKNOWN}


def tokens_of(text: str) -> list[int]:
    """A word is a token: w123 is 123; there are a few others."""
    return [VOCABULARY.get(word, UNKNOWN) for word in text.split()]


def save_tokenizer(folder: Path) -> None:
    """The same as files, for a router."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps({"chat_template": TEMPLATE}))


def prompt_of(body: dict[str, Any]) -> list[int]:
    """The tokens of a completion's prompt, or of a chat's messages by this worker's template."""
    if "messages" in body:
        words = []
        for message in body["messages"]:
            words.append(f"<{message['role']}> {message.get('content') or ''}")
        if not body.get("continue_final_message"):
            words.append("<assistant>")
        return tokens_of(" ".join(words))
    prompt = body.get("prompt", body.get("text"))
    if isinstance(prompt, str):
        return tokens_of(prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise ValueError("prompt is neither a text nor token ids")


class Words:
    """The words that follow a prompt."""

    def __init__(self, prompt: list[int], seed: int | None) -> None:
        self._state = zlib.crc32(array("Q", prompt).tobytes())
        self._seed, self._place = seed, 0

    def _take(self, token: int) -> None:
        self._state = zlib.crc32(array("Q", [token]).tobytes(), self._state)

    def next(self) -> str:
        """Greedy: by the words before alone. Seeded: by a generator that began with the answer."""
        word = self._state
        if self._seed is not None:
            word = zlib.crc32(struct.pack("<qQ", self._seed, self._place), word)
        self._place += 1
        self._take(word % WORDS)
        return f" w{word % WORDS}"


class BlockCache:
    """The prefix cache of an engine, LRU; `events` collects what it would publish."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._held: OrderedDict[int, None] = OrderedDict()
        self.events: list[dict[str, Any]] = []
        self.queried = self.hit = 0

    @property
    def held(self) -> set[int]:
        return set(self._held)

    def use(self, tokens: list[int], counted: bool = True) -> int:
        """Tokens that must be computed; afterwards all whole blocks are cached that fit."""
        size, held = self.block_size, self._held
        hashes, parent = [], 0
        for at in range(0, len(tokens) - len(tokens) % size, size):
            parent = hash((parent, *tokens[at : at + size])) & MOST_HASH
            hashes.append(parent)
        del hashes[self.blocks :]
        found = 0
        while found < len(hashes) and hashes[found] in held:
            found += 1
        removed = []
        for name in hashes[:found]:
            held.move_to_end(name)
        for name in hashes[found:]:
            if name in held:
                held.move_to_end(name)
                continue
            if len(held) >= self.blocks:
                removed.append(held.popitem(last=False)[0])
            held[name] = None
        # LRU gives up the end of a prefix before its beginning.
        for name in reversed(hashes):
            if name in held:
                held.move_to_end(name)
        if removed:
            self.events.append({"type": "BlockRemoved", "block_hashes": removed, "medium": "GPU"})
        if found < len(hashes):
            self.events.append({
                "type": "BlockStored", "block_hashes": hashes[found:],
                "parent_block_hash": hashes[found - 1] if found else None,
                "token_ids": tokens[found * size : len(hashes) * size],
                "block_size": size, "lora_id": None, "medium": "GPU", "lora_name": None,
            })  # fmt: skip
        cached = min(found * size, len(tokens) - 1)
        if counted:
            self.queried += len(tokens)
            self.hit += cached
        return len(tokens) - cached
