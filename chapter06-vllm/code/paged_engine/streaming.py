"""From the engine's outputs to what a client reads: one JSON object, or a stream of chunks.

A stream is Server-Sent Events: `data: {...}` and an empty line for each chunk, `data: [DONE]` at
the end. Each output of the engine becomes a chunk at once, also when it has no text yet (the token
was a part of a character): a client that measures the time between tokens sees every one.
"""

from collections.abc import AsyncIterator
from typing import Any

from paged_engine.async_engine import Generation, Unavailable
from paged_engine.detokenizer import TokenTexts
from paged_engine.engine import Output
from paged_engine.prompting import NoTexts, Prompts
from paged_engine.protocol import GenerationRequest
from paged_engine.responses import (
    CachedTokens,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
    error_body,
)
from paged_engine.sampler import SampledToken


class Tally:
    """The tokens of one HTTP request so far."""

    def __init__(self) -> None:
        self.prompts: dict[str, tuple[int, int]] = {}  # tokens, cached tokens
        self.completion = 0

    def add(self, output: Output) -> None:
        self.prompts.setdefault(output.request_id, (output.prompt_tokens, output.cached_tokens))
        self.completion += len(output.token_ids)

    def usage(self) -> Usage:
        prompt, cached = (sum(counts) for counts in zip(*self.prompts.values(), strict=True))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion,
            total_tokens=prompt + self.completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    def __str__(self) -> str:
        prompt = sum(tokens for tokens, _ in self.prompts.values())
        cached = sum(tokens for _, tokens in self.prompts.values())
        return f"prompt={prompt} cached={cached} output={self.completion} tokens"


class Answer:
    """Writes the answer to one request; its two kinds differ in the shape of a choice."""

    def __init__(self, name: str, model: str, body: GenerationRequest, prompts: Prompts) -> None:
        self.name = name
        self.model = model
        self.body = body
        self.prompts = prompts
        self.tally = Tally()
        self.prompt_ids: list[list[int]] = []  # set before the engine is asked
        self._places: dict[int, TokenTexts | NoTexts] = {}  # choice -> its tokens so far

    async def whole(self, generation: Generation) -> Completion | ChatCompletion:
        """Wait for all outputs. Raises Unavailable."""
        outputs: list[list[Output]] = [[] for _ in range(generation.sequences)]
        async for output in generation:
            self.tally.add(output)
            outputs[self.index(generation, output)].append(output)
        return self.full([self.choice(index, row) for index, row in enumerate(outputs)])

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        try:
            async for output in generation:
                self.tally.add(output)
                yield _event(self.chunk([self.delta(self.index(generation, output), output)]))
            if self.body.include_usage:
                yield _event(self.chunk([], self.tally.usage()))
            yield b"data: [DONE]\n\n"
        except Unavailable as failure:  # the status is sent already
            yield b"data: " + error_body(str(failure), "server_error") + b"\n\n"

    def index(self, generation: Generation, output: Output) -> int:
        """All samples of the first prompt, then all of the second, and so on."""
        return generation.prompt_of[output.request_id] * self.body.samples + output.index

    def place(self, index: int) -> TokenTexts | NoTexts:
        """Where the next token of a choice stands."""
        if index not in self._places:
            prompt = self.prompt_ids[index // self.body.samples]
            self._places[index] = self.prompts.token_texts(prompt)
        return self._places[index]

    def choice(self, index: int, outputs: list[Output]) -> Any:
        raise NotImplementedError

    def delta(self, index: int, output: Output) -> Any:
        raise NotImplementedError

    def full(self, choices: list[Any]) -> Any:
        raise NotImplementedError

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> Any:
        raise NotImplementedError


class CompletionAnswer(Answer):
    def choice(self, index: int, outputs: list[Output]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text="".join(output.text for output in outputs),
            logprobs=self.logprobs(index, outputs),
            finish_reason=outputs[-1].finish_reason,
        )

    def delta(self, index: int, output: Output) -> CompletionChoice:
        return self.choice(index, [output])

    def full(self, choices: list[Any]) -> Completion:
        return self.chunk(choices, self.tally.usage())

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> Completion:
        return Completion(id=self.name, model=self.model, choices=choices, usage=usage)

    def logprobs(self, index: int, outputs: list[Output]) -> CompletionLogprobs | None:
        if self.body.wanted_logprobs is None:
            return None
        written = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        place = self.place(index)
        for one in _sampled(outputs):
            begin, text = place.characters, place.read(one.token)[0]
            written.tokens.append(text)
            written.token_logprobs.append(one.logprob)
            written.top_logprobs.append(_by_text(one, place))
            place.take(one.token)
            # it may also end a character that never came to its end, which reads as U+FFFD
            written.text_offset.append(max(begin, place.characters - len(text)))
        return written


class ChatAnswer(Answer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: set[int] = set()  # choices that have had their role

    def choice(self, index: int, outputs: list[Output]) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content="".join(output.text for output in outputs)),
            logprobs=self.logprobs(index, outputs),
            finish_reason=outputs[-1].finish_reason,
        )

    def delta(self, index: int, output: Output) -> ChatChunkChoice:
        first = index not in self.begun
        self.begun.add(index)
        return ChatChunkChoice(
            index=index,
            delta=Delta(role="assistant" if first else None, content=output.text),
            logprobs=self.logprobs(index, [output]),
            finish_reason=output.finish_reason,
        )

    def full(self, choices: list[Any]) -> ChatCompletion:
        usage = self.tally.usage()
        return ChatCompletion(id=self.name, model=self.model, choices=choices, usage=usage)

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.name, model=self.model, choices=choices, usage=usage)

    def logprobs(self, index: int, outputs: list[Output]) -> ChatLogprobs | None:
        if self.body.wanted_logprobs is None:
            return None
        content, place = [], self.place(index)
        for one in _sampled(outputs):
            likely = (one.top or {}).items()
            top = [TopLogprob(**_token(token, logprob, place)) for token, logprob in likely]
            content.append(TokenLogprob(**_token(one.token, one.logprob, place), top_logprobs=top))
            place.take(one.token)
        return ChatLogprobs(content=content)


def _sampled(outputs: list[Output]) -> list[SampledToken]:
    return [one for output in outputs for one in output.logprobs or ()]


def _by_text(sampled: SampledToken, place: TokenTexts | NoTexts) -> dict[str, float]:
    """The likeliest tokens' log probabilities and the sampled one's, by how the tokens read.

    Two tokens may read alike, as an added one and one of the vocabulary: the first has the text,
    and the sampled one is always the first; another is written as vLLM writes ids.
    """
    names = {sampled.token: place.read(sampled.token)[0]}
    for token in sampled.top or {}:
        text = place.read(token)[0]
        names.setdefault(token, text if text not in names.values() else f"token_id:{token}")
    written = {names[token]: logprob for token, logprob in (sampled.top or {}).items()}
    written.setdefault(names[sampled.token], sampled.logprob or 0.0)
    return written


def _token(token: int, logprob: float | None, place: TokenTexts | NoTexts) -> dict[str, Any]:
    text, made = place.read(token)
    return {"token": text, "logprob": logprob, "bytes": None if made is None else list(made)}


def _event(chunk: Completion | ChatChunk) -> bytes:
    return b"data: " + chunk.model_dump_json().encode() + b"\n\n"
