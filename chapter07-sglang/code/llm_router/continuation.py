"""How a stream that broke off goes on: on another worker, with the tokens so far.

There are two ways. The cheap one asks for what is missing: the prompt and the text so far are the
new prompt, of which a worker computes the keys and values at once (a prefill instead of a decode).
A greedy answer goes on with the very same text, a sampled one with one just as likely. With a seed
it would not be the same: the generator of random numbers would begin anew. So a seeded request is
asked again from its beginning, and what the client has is left out, after it was compared. That is
also the way out for a greedy request where the worker cannot continue a message.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from llm_router.http import ChunkedBody

FOLD_BYTES = 2**20  # of events are kept as they are, before only their text is
DEFAULT_MAX_TOKENS = 16  # of a completion, in the OpenAI API
FOREIGN = (TypeError, ValueError, AttributeError, KeyError)  # JSON of another shape raises these
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# With other parameters than these, what follows a text may depend on how it came to be: on a
# grammar's state, or on what a penalty counts as the answer.
CONTINUED = {
    "model", "prompt", "messages", "stream", "stream_options", "max_tokens",
    "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "stop_token_ids", "ignore_eos", "logit_bias", "n", "skip_special_tokens", "add_special_tokens",
    "user", "session_id", "prompt_cache_key", "safety_identifier", "metadata", "store",
    "service_tier", "priority", "request_id", "parallel_tool_calls", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message",
}  # fmt: skip
COUNTS = ("max_tokens", "max_completion_tokens", "min_tokens")
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "best_of": 1}


class Transcript:
    """What a client has had of its stream. While all goes well the bytes are only kept; they are
    read when a stream breaks off, or when they become many."""

    def __init__(self) -> None:
        self.started = False
        self.text = ""
        self.tokens = 0
        self.first: dict[str, Any] = {}  # id, created and model, for the events to come
        self.finish: str | None = None
        self.only_text = True
        self._done = False
        self._raw: list[bytes] = []
        self._size = 0

    def append(self, data: bytes) -> None:
        """Whole chunks of whole events."""
        self._raw.append(data)
        self._size += len(data)
        if self._size > FOLD_BYTES:
            self.fold()

    @property
    def done(self) -> bool:
        self.fold()
        return self._done

    def fold(self) -> None:
        if not self._raw:
            return
        payload = ChunkedBody().feed(b"".join(self._raw))
        self._raw, self._size = [], 0
        texts = [self.text]
        for data in events_of(payload):
            if data == b"[DONE]":
                self._done = True
            elif (event := parsed(data)) is None:
                self.only_text = False
            else:
                texts.append(self._take(event))
        self.text = "".join(texts)

    def _take(self, event: dict[str, Any]) -> str:
        if not self.first:
            self.first = {k: event[k] for k in ("id", "created", "model") if k in event}
        try:
            text, counted, only_text = piece_of(event)
            for choice in event.get("choices") or ():
                self.finish = choice.get("finish_reason") or self.finish
            self.tokens += counted
            if usage := event.get("usage"):  # where the engine counts, it knows better
                self.tokens = usage["completion_tokens"] + 0
        except FOREIGN:
            text, only_text = "", False
        self.only_text &= only_text
        return text


def events_of(payload: bytes) -> Iterator[bytes]:
    """The data of each event of whole ones."""
    for event in payload.split(b"\n\n"):
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines)


def parsed(data: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def is_whole(event: bytes) -> bool:
    """Whether nothing but the empty line after it is missing."""
    return all(
        data == b"[DONE]" or parsed(data) is not None for data in [*events_of(event)] or [b""]
    )


def piece_of(event: dict[str, Any]) -> tuple[str, int, bool]:
    """The text of an event, its tokens, and whether it is nothing but text of one choice.

    An engine sends a token an event; where it has put several into one, only itself knows how many.
    Raises where the JSON is of another shape.
    """
    text, tokens, only_text = "", 0, "error" not in event
    for choice in event.get("choices") or ():
        only_text &= choice.get("index", 0) == 0 and not choice.get("logprobs")
        delta = choice.get("delta")
        if delta is None:
            text += choice.get("text") or ""
            tokens += 1
            continue
        text += delta.get("content") or ""
        tokens += not ("role" in delta and not delta.get("content"))
        only_text &= all(not delta[key] for key in delta if key not in ("role", "content"))
    return text, tokens, only_text


class Splice:
    """The request for the rest of a stream, and what becomes of the answer's events.

    `body` is what the worker is asked; with `skip` it begins anew, and so many characters are left
    out.
    """

    def __init__(self, body: dict[str, Any], transcript: Transcript, replay: bool) -> None:
        self.body = orjson.dumps(body)
        self.replay = replay
        self.refused = self.diverged = self.finished = False
        self._first = transcript.first
        self._tokens = transcript.tokens
        self._skip = transcript.text if replay else ""

    def feed(self, events: bytes) -> bytes:
        return b"".join(self._event(data) for data in events_of(events))

    def closing(self) -> bytes:
        """What ends the client's stream, where no worker is needed for it."""
        return b""

    def _event(self, data: bytes) -> bytes:
        event = parsed(data)
        if event is None:
            return b"data: " + data + b"\n\n"  # [DONE]
        event.update(self._first)
        choices = event.get("choices") or []
        if choices and not self._choice(choices[0]):
            return b""
        if (usage := event.get("usage")) and not self.replay:
            self._sum(usage)
        return b"data: " + orjson.dumps(event) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Whether there is something for the client in it, when what it has is taken away."""
        delta = choice.get("delta")
        holder, name = (choice, "text") if delta is None else (delta, "content")
        if delta is not None and delta.pop("role", None) and not delta.get("content"):
            return bool(choice.get("finish_reason"))
        text = holder.get(name) or ""
        if self._skip:
            known = min(len(text), len(self._skip))
            if text[:known] != self._skip[:known]:
                self.diverged = True
                return False
            self._skip = self._skip[known:]
            holder[name] = text = text[known:]
            return bool(text or choice.get("finish_reason"))
        return True

    def _sum(self, usage: dict[str, Any]) -> None:
        """The tokens so far were the prompt's here; for the client they are the answer's."""
        usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._tokens
        if "prompt_tokens" in usage:
            usage["prompt_tokens"] = max(0, usage["prompt_tokens"] - self._tokens)


class Closing(Splice):
    """All of the text is there, only the end of the stream is missing."""

    def __init__(self, path: str, transcript: Transcript) -> None:
        super().__init__({}, transcript, replay=False)
        self.finished = True
        self._last = None
        if transcript.finish is None:
            choice: dict[str, Any] = {"text": ""} if path == COMPLETIONS else {"delta": {}}
            kind = "text_completion" if path == COMPLETIONS else "chat.completion.chunk"
            choices = [{"index": 0, **choice, "finish_reason": "length"}]
            self._last = {**transcript.first, "object": kind, "choices": choices}

    def closing(self) -> bytes:
        last = b"" if self._last is None else b"data: " + orjson.dumps(self._last) + b"\n\n"
        return last + b"data: [DONE]\n\n"


def plan(
    path: str, request: dict[str, Any], so_far: Transcript, before: Splice | None
) -> Splice | None:
    """How to go on; None where there is no way. `before` is the way tried last."""
    so_far.fold()
    if path not in (CHAT, COMPLETIONS) or not request:
        return None
    if so_far.finish is not None:
        return Closing(path, so_far)
    if not so_far.text and so_far.only_text:
        return Splice(request, so_far, replay=True)  # nothing to leave out
    if not so_far.only_text or request.get("n") not in (None, 1):
        return None
    greedy = request.get("temperature") == 0
    seeded = request.get("seed") is not None
    refused = before is not None and before.refused
    if (greedy or not seeded) and not refused and _can_be_continued(path, request):
        return _continued(path, request, so_far)
    if (greedy or seeded) and not (refused and before is not None and before.replay):
        return Splice(request, so_far, replay=True)
    return None


def _can_be_continued(path: str, request: dict[str, Any]) -> bool:
    for name, value in request.items():
        harmless = value in (None, False, [], {}) or value == NEUTRAL.get(name)
        if name not in CONTINUED and not harmless:
            return False
        if name in COUNTS and value is not None and type(value) is not int:
            return False
    if path == COMPLETIONS:
        return isinstance(request.get("prompt"), str)
    messages = request.get("messages")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return False
    return not request.get("continue_final_message") or _text_of(messages[-1]) is not None


def _text_of(message: dict[str, Any]) -> str | None:
    """What it says; None where that is more than text."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        only = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        return "".join(map(str, texts)) if only else None
    return content if isinstance(content, str) else None


def _continued(path: str, request: dict[str, Any], so_far: Transcript) -> Splice:
    body = dict(request)
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    most = body.get(limit)
    if path == COMPLETIONS:
        body["prompt"] = request["prompt"] + so_far.text
        most = DEFAULT_MAX_TOKENS if most is None else most
    else:
        messages, text = list(request["messages"]), so_far.text
        if request.get("continue_final_message"):  # the client's own beginning of the answer
            text = (_text_of(messages.pop()) or "") + text
        body["messages"] = [*messages, {"role": "assistant", "content": text}]
        body.update(continue_final_message=True, add_generation_prompt=False)
    if most is not None:
        if most <= so_far.tokens:  # only its last word, that there is no more, is missing
            return Closing(path, so_far)
        body[limit] = most - so_far.tokens
    if (least := body.get("min_tokens")) is not None:
        body["min_tokens"] = max(0, least - so_far.tokens)
    return Splice(body, so_far, replay=False)
