"""What the server answers: the OpenAI API's objects, errors included."""

import json
import time
from typing import Literal

from fastapi.responses import Response
from pydantic import BaseModel, Field

from paged_engine.request import FinishReason


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """`cached_tokens`: how many of the prompt's tokens the prefix cache had."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """One entry a token; `text_offset` counts characters from the beginning of the text."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float]] = []


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Answer(BaseModel):
    id: str
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str


class Completion(Answer):
    """Also a chunk of a stream: then `usage` is in the last one only, where it was asked for."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=lambda usage: usage is None)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None  # in the text; None for a special token, which is not in it


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """A chat's text goes on; the first one of a choice says the role."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda role: role is None)
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=lambda usage: usage is None)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["paged_engine"] = "paged_engine"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str


def error_response(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | int | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error in the OpenAI API's shape, as its clients expect it."""
    body = error_body(message, kind, param, code)
    return Response(body, status, {"content-type": "application/json", **(headers or {})})


def error_body(
    message: str, kind: str, param: str | None = None, code: str | int | None = None
) -> bytes:
    """ASCII: what a client sent may hold half of a surrogate pair, which UTF-8 cannot encode."""
    detail = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": detail}).encode("ascii")
