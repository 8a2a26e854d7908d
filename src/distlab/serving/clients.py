"""Requests to an OpenAI server, streamed and timed, many at once: for scripts that load one."""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai

from distlab import script
from distlab.errors import RunError
from distlab.host import LOOPBACK, allow_open_files

OWN_FILES = 64  # libraries, sockets' selector and logs, beside a connection for each request


def add_server_flags(parser: script.Parser) -> None:
    """Which server is asked, for what, and how long an answer may be and take."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8100/v1", metavar="URL")
    add("--model", help="its name on the server (default: the first that the server names)")
    add("--max-tokens", type=script.positive_int, metavar="N", help="of an answer")
    add("--timeout", type=script.positive_float, default=120.0, metavar="S", help="of a request")


@dataclass(frozen=True)
class Answer:
    """One answered request. Times are seconds; `tokens` are those that the server counted, None
    where it tells no usage."""

    text: str
    tokens: int | None
    ttft: float
    seconds: float
    finish_reason: str | None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first one; None for an answer of one, or uncounted."""
        after_first = (self.tokens or 0) - 1
        return (self.seconds - self.ttft) / after_first if after_first > 0 else None


def counted_tokens(answers: Sequence[Answer]) -> int:
    """Of all answers. Raises `RunError` where the server does not tell: unknown is not 0."""
    counts = [answer.tokens for answer in answers if answer.tokens is not None]
    if len(counts) < len(answers):
        raise RunError("the server tells no usage, so its tokens cannot be counted")
    return sum(counts)


@dataclass(frozen=True)
class Server:
    """A server that answers, and the model that it is asked for."""

    client: openai.AsyncOpenAI
    model: str

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """A greedy completion of `prompt`, streamed."""
        started = time.perf_counter()
        first, tokens, reason = None, None, None
        pieces: list[str] = []
        stream = await self.client.completions.create(
            **self._question(prompt, max_tokens),
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if first is None:
                    first = time.perf_counter()
                pieces.append(choice.text or "")  # some servers' last one has null
                reason = choice.finish_reason or reason
        ended = time.perf_counter()
        ttft = (first or ended) - started
        return Answer("".join(pieces), tokens, ttft, ended - started, reason)

    async def ask_whole(self, prompt: str, max_tokens: int) -> tuple[str, int | None]:
        """The same completion in one piece: its text and its number of tokens, if it is told."""
        made = await self.client.completions.create(**self._question(prompt, max_tokens))
        return made.choices[0].text or "", made.usage.completion_tokens if made.usage else None

    async def ask_all(
        self, prompts: Sequence[str], max_tokens: int, concurrency: int
    ) -> tuple[list[Answer], float]:
        """The answers, `concurrency` requests at a time, and the seconds that all took.

        A closed loop: who has an answer sends the next request at once.
        """
        allow_open_files(concurrency + OWN_FILES)
        places = asyncio.Semaphore(concurrency)

        async def one(prompt: str) -> Answer:
            async with places:
                return await self.ask(prompt, max_tokens)

        started = time.perf_counter()
        answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return list(answers), time.perf_counter() - started

    def _question(self, prompt: str, max_tokens: int) -> dict:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }


@asynccontextmanager
async def connected(
    base_url: str, timeout_s: float, model: str | None = None
) -> AsyncIterator[Server]:
    """The server at `base_url`, asked for `model`, or for the first one that it names.

    The key is OPENAI_API_KEY's, where one is set. Raises `RunError`, in one line, when nobody
    answers there, or while a request of the block fails.
    """
    key = os.environ.get("OPENAI_API_KEY") or "none"
    by_proxy = urlsplit(base_url).hostname not in LOOPBACK
    try:
        http = openai.DefaultAsyncHttpxClient(trust_env=by_proxy)
    except (ImportError, ValueError) as error:  # a SOCKS proxy needs a package, or its URL is none
        raise RunError(f"the proxy for {base_url} cannot be used: {error}") from error
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key=key, timeout=timeout_s, max_retries=0, http_client=http
    ) as client:
        try:
            names = [known.id async for known in client.models.list()]
            if not names or (model is not None and model not in names):
                wanted = f"model {model}" if model else "model"
                raise RunError(f"the server at {base_url} has no {wanted}; it has {names}")
            yield Server(client, model or names[0])
        except openai.APITimeoutError as error:
            raise RunError(f"{base_url} did not answer within {timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            if lacks_files(error):
                raise RunError(
                    "this process or machine has no open file left for another connection; raise "
                    "the limit (ulimit -Hn) or send fewer requests at once"
                ) from error
            raise RunError(
                f"no server answers at {base_url} ({error.__cause__ or error}); start one, or name "
                "another by --base-url"
            ) from error
        except openai.APIStatusError as error:
            raise RunError(
                f"the server at {base_url} answered {error.status_code}: {error.message}"
            ) from error


def lacks_files(error: BaseException | None) -> bool:
    """Whether its cause, which libraries wrap in errors of theirs, is that no file was left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False
