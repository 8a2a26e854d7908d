"""The blocks of a request's prompt, as its worker's prefix cache will cut them."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
        self._recent = RecentTokens(lambda text: self._encode(text))
        self._template: Any = None
        if tokenizer is not None:
            self._load(Path(tokenizer))

    def _load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
        except Exception as error:  # tokenizers raises its own Exception itself
            raise UsageError(f"--tokenizer {folder} has no tokenizer.json: {error}") from error
        config = folder / "tokenizer_config.json"
        settings = orjson.loads(config.read_bytes()) if config.exists() else {}
        file = folder / "chat_template.jinja"
        source = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
        if isinstance(source, str):
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(source)
            self._words = {k: v for k, v in settings.items() if isinstance(v, str)}

    def __call__(self, exchange: Asked) -> tuple[Sequence[int], int, int]:
        """Block keys, tokens in all, and tokens of a block."""
        body, size = exchange.parsed, self.block_size
        prompt = body.get("prompt", body.get("text"))
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            return block_keys(prompt[: MOST_BLOCKS * size], size), len(prompt), size
        if isinstance(prompt, list):
            prompt = prompt[0] if prompt else ""
        if "messages" in body:
            text = self._chat(body["messages"])
        else:
            text = prompt if isinstance(prompt, str) else ""
        if self._encode is not None:
            ids = self._recent.ids(text)
            return block_keys(ids[: MOST_BLOCKS * size], size), len(ids), size
        raw = text.encode("utf-8", "replace")
        keys = text_keys(raw[: MOST_BLOCKS * size * BYTES_PER_TOKEN], size * BYTES_PER_TOKEN)
        return keys, len(raw) // BYTES_PER_TOKEN, size

    def _chat(self, messages: Any) -> str:
        if not isinstance(messages, list):
            return ""
        if self._template is not None:
            try:
                return str(self._template.render(
                    messages=messages, add_generation_prompt=True, **self._words
                ))  # fmt: skip
            except Exception:  # whatever a client's messages do to a template: the worker refuses
                return ""
        parts = [m for m in messages if isinstance(m, dict)]
        return "".join(f"<{m.get('role')}>{m.get('content')}" for m in parts)


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
