"""The blocks of a request's prompt, as its worker's prefix cache will cut them."""

import json
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import orjson

from distlab.errors import UsageError
from llm_router.policies import Asked
from llm_router.prefix_index import block_keys, text_keys

BYTES_PER_TOKEN = 4  # of English text, about, where there is no tokenizer
MOST_BLOCKS = 4096  # of a prompt are looked up


class PromptKeys:
    """With the workers' tokenizer a prompt's blocks are theirs, and their KV events can be
    followed; without one, pieces of its text stand for them."""

    def __init__(self, tokenizer: str | None, block_size: int) -> None:
        """`tokenizer` is a folder with tokenizer.json, and tokenizer_config.json for chats."""
        self.block_size = block_size
        self._encode: Any = None
        self._recent = RecentTokens(lambda text: self._encode(text, add_special_tokens=False))
        self._specials: list[int] = []  # before a prompt that is no chat
        self._template: Any = None
        if tokenizer is not None:
            self._load(Path(tokenizer))

    def _load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
        except Exception as error:  # tokenizers raises its own Exception itself
            raise UsageError(f"--tokenizer {folder} has no tokenizer.json: {error}") from error
        one = self._encode("a")
        plain = one.special_tokens_mask.index(0) if 0 in one.special_tokens_mask else 0
        self._specials = one.ids[:plain]
        try:
            self._load_template(folder)
        except Exception as error:  # not JSON, not UTF-8, no template
            raise UsageError(f"--tokenizer {folder} has a broken chat template: {error}") from error

    def _load_template(self, folder: Path) -> None:
        """As transformers' apply_chat_template has it."""
        config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        settings = orjson.loads(config.read_bytes()) if config.exists() else {}
        source = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if source is None:
            return
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=_refuse, strftime_now=time.strftime)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self._template = environment.from_string(source)
        words = {k: v["content"] if _is_token(v) else v for k, v in settings.items()}
        self._words = {k: v for k, v in words.items() if isinstance(v, str)}

    def __call__(self, exchange: Asked) -> tuple[Sequence[int], int, int]:
        """Block keys, tokens in all, and tokens of a block."""
        body, size = exchange.parsed, self.block_size
        named = (body[name] for name in ("prompt", "text", "input_ids") if body.get(name))
        prompt, chat = next(named, ""), "messages" in body
        if isinstance(prompt, list) and type(prompt[0]) is not int:
            prompt = prompt[0]  # of many
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return block_keys(prompt[: MOST_BLOCKS * size], size), len(prompt), size
        text = self._chat(body) if chat else prompt if isinstance(prompt, str) else ""
        if self._encode is not None:
            ids = self._recent.ids(text)
            if self._specials and body.get("add_special_tokens", not chat):
                ids = self._specials + ids
            return block_keys(ids[: MOST_BLOCKS * size], size), len(ids), size
        raw = text.encode("utf-8", "replace")
        keys = text_keys(raw[: MOST_BLOCKS * size * BYTES_PER_TOKEN], size * BYTES_PER_TOKEN)
        return keys, len(raw) // BYTES_PER_TOKEN, size

    def _chat(self, body: dict[str, Any]) -> str:
        messages = body["messages"]
        if not isinstance(messages, list):
            return ""
        if self._template is not None:
            try:
                given = {
                    "add_generation_prompt": body.get("add_generation_prompt", True),
                    "tools": body.get("tools"), **(body.get("chat_template_kwargs") or {}),
                }  # fmt: skip
                return str(self._template.render({**self._words, "messages": messages, **given}))
            except Exception:  # whatever a client's messages do to a template: the worker refuses
                return ""
        parts = [m for m in messages if isinstance(m, dict)]
        return "".join(f"<{m.get('role')}>{m.get('content')}" for m in parts)


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and "content" in value


def _refuse(message: str) -> None:
    """What templates call raise_exception."""
    raise ValueError(message)


class RecentTokens:
    """Token ids of texts that mostly go on with an earlier one: only what is new is tokenized.

    A conversation's every turn begins with the one before, and a tokenizer takes a millisecond for
    a thousand tokens. The ids up to a few tokens before the end of the known text are taken over,
    and the rest is tokenized from there. It may be cut otherwise at its own beginning, so the two
    must agree on the tokens around the seam; where they do not, all of the text is tokenized.
    """

    STEP = 256  # characters; a text is known up to a multiple of it
    OVERLAP, UNSAFE = 12, 6  # tokens that both have; the first of them may be cut otherwise
    MOST = 2**21  # ids that are kept, in all

    def __init__(self, encode: Callable[[str], Any]) -> None:
        self._encode = encode
        self._known: OrderedDict[int, tuple[list[int], int, int]] = OrderedDict()
        self._kept = 0

    def ids(self, text: str) -> list[int]:
        keys = list(accumulate(
            (text[at : at + self.STEP] for at in range(0, len(text) - self.STEP + 1, self.STEP)),
            lambda key, piece: hash((key, piece)), initial=0,
        ))[1:]  # fmt: skip
        for key in reversed(keys):
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                if (joined := self._joined(text, *known)) is not None:
                    ids, seam, offsets = joined
                    break
                self._kept -= len(self._known.pop(key)[0])
        else:
            encoded = self._encode(text)
            ids, seam, offsets = encoded.ids, 0, encoded.offsets
        self._keep(keys, ids, seam, offsets)
        return ids

    def _joined(
        self, text: str, ids: list[int], count: int, at: int
    ) -> tuple[list[int], int, list[tuple[int, int]]] | None:
        """`ids[count]` begins at character `at`; those after it are known as well."""
        tail = self._encode(text[at:])
        unsafe, overlap = self.UNSAFE, self.OVERLAP
        if tail.ids[unsafe:overlap] != ids[count + unsafe : count + overlap]:
            return None
        offsets = [(begin + at, end + at) for begin, end in tail.offsets[overlap:]]
        return ids[: count + overlap] + tail.ids[overlap:], count + overlap, offsets

    def _keep(
        self, keys: list[int], ids: list[int], seam: int, offsets: list[tuple[int, int]]
    ) -> None:
        """Remember where a token begins, some before each multiple of STEP that is new."""
        ends, kept = [end for _, end in offsets], False
        for i, key in enumerate(keys, 1):
            if key in self._known:
                continue
            last = bisect_right(ends, i * self.STEP) - 2 * self.OVERLAP
            if last >= 0:
                self._known[key] = (ids, seam + last, offsets[last][0])
                self._kept += len(ids)
                kept = True
        while kept and self._kept > self.MOST and self._known:
            _, (old, _, _) = self._known.popitem(last=False)
            self._kept -= len(old)
