"""The blocks of a request's prompt, as its worker's prefix cache will cut them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from distlab.errors import UsageError
from llm_router.prefix_index import block_keys, text_keys

if TYPE_CHECKING:
    from llm_router.exchange import Exchange

BYTES_PER_TOKEN = 4  # of English text, about, where there is no tokenizer
MOST_BLOCKS = 4096  # of a prompt are looked up


class PromptKeys:
    """With the workers' tokenizer a prompt's blocks are theirs, and their KV events can be
    followed; without one, pieces of its text stand for them."""

    def __init__(self, tokenizer: str | None, block_size: int) -> None:
        """`tokenizer` is a folder with tokenizer.json, and tokenizer_config.json for chats."""
        self.block_size = block_size
        self._encode: Any = None
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

    def __call__(self, exchange: "Exchange") -> tuple[Sequence[int], int, int]:
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
            ids = self._encode(text).ids
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
