"""From what a client sent to token ids: the tokenizer, and a chat's template."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError

from distlab.errors import UsageError
from paged_engine.detokenizer import TokenTexts
from paged_engine.loading import chat_ids, text_ids
from paged_engine.protocol import ChatRequest, CompletionRequest, RequestError

Result = TypeVar("Result")


class NoTexts:
    """Instead of `TokenTexts` where there is no tokenizer: tokens as vLLM writes them, no text."""

    characters = 0

    def read(self, token_id: int) -> tuple[str, bytes | None]:
        return f"token_id:{token_id}", None

    def take(self, token_id: int) -> None:
        pass


class Prompts:
    """Tokenizes in a thread, so that a long prompt does not hold up the other requests' streams.

    The thread has a tokenizer of its own: the engine's is at work in the engine's thread.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.chat_template = chat_template  # None: the tokenizer's own, which may be several
        self.has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        if chat_template and tokenizer is not None:
            self._check_template()
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def of_completion(self, body: CompletionRequest) -> list[list[int]]:
        return await self._in_thread(lambda: [self._ids(prompt) for prompt in body.prompts])

    async def of_chat(self, body: ChatRequest) -> list[list[int]]:
        """Raises RequestError without a template, and where the template refuses the messages."""
        if self.tokenizer is None or not self.has_template:
            raise RequestError(
                "This model has no chat template; use /v1/completions, or start the server with "
                "--chat-template FILE",
                "messages",
            )
        return await self._in_thread(lambda: [self._chat_ids(body)])

    def token_texts(self, prompt_ids: Sequence[int]) -> "TokenTexts | NoTexts":
        """What the tokens of an output add to its text after this prompt."""
        return TokenTexts(self.tokenizer, prompt_ids) if self.tokenizer is not None else NoTexts()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_template(self) -> None:
        try:
            chat_ids(self.tokenizer, [{"role": "user", "content": "hello"}], self.chat_template)
        except UsageError as refusal:  # it may refuse this one message
            if isinstance(mistake := refusal.__cause__, TemplateSyntaxError):
                raise UsageError(
                    "--chat-template is no Jinja template: "
                    f"line {mistake.lineno}: {mistake.message}"
                ) from None

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and self.tokenizer is None:
            raise RequestError("This model has no tokenizer; send token ids", "prompt")
        ids = text_ids(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("The prompt has no tokens", "prompt")
        return ids

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        messages = [{"role": one.role, "content": one.text} for one in body.messages]
        try:
            ids = chat_ids(self.tokenizer, messages, self.chat_template)
        except UsageError as refusal:
            raise RequestError(str(refusal), "messages") from None
        if not ids:
            raise RequestError("The chat template makes no tokens of these messages", "messages")
        return ids

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
