"""The server's application: its routes, and how each error becomes an OpenAI error."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from distlab.errors import UsageError
from paged_engine.async_engine import AsyncEngine, Overloaded, Unavailable
from paged_engine.prompting import Prompts
from paged_engine.protocol import (
    DEFAULT_MAX_TOKENS,
    PASSED_ON,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
)
from paged_engine.responses import (
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    Model,
    ModelList,
    Version,
    error_response,
)
from paged_engine.streaming import Answer, ChatAnswer, CompletionAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or comes at a bad time"},
    503: {"model": ErrorBody, "description": "The engine has failed, or the server is stopping"},
}
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk in JSON; [DONE] at the end"}},
    "required": ["data"],
}
STREAM = {"content": {"text/event-stream": {"schema": EVENT}}}
HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class Service:
    """What the routes work with."""

    def __init__(self, model: str, engine: AsyncEngine, prompts: Prompts, created: int) -> None:
        self.engine = engine
        self.prompts = prompts
        self.limit = engine.engine.max_model_len
        self.card = Model(id=model, created=created, max_model_len=self.limit)

    async def answer(
        self,
        request: Request,
        body: GenerationRequest,
        answer: Answer,
        prompts: list[list[int]],
    ) -> Any:
        """The whole answer, or a response that streams it."""
        longest = max(len(prompt) for prompt in prompts)
        self._check_length(longest, body)
        chat = isinstance(body, ChatRequest)
        params = body.sampling(self.limit - longest if chat else DEFAULT_MAX_TOKENS)
        generation = request.state.call.generation
        request.state.call.tally = answer.tally
        answer.prompt_ids = prompts
        await generation.start(prompts, params, answer.name)
        if body.stream:
            events = answer.events(generation)
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # for proxies
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        return await answer.whole(generation)

    def _check_length(self, longest: int, body: GenerationRequest) -> None:
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        if longest >= self.limit:
            raise RequestError(
                f"The prompt has {longest} tokens; the model's context has {self.limit}, and one "
                "must be left for the answer",
                field,
                code="context_length_exceeded",
            )
        if longest + (body.wanted_tokens or 0) > self.limit:
            raise RequestError(
                f"The prompt's {longest} tokens and max_tokens {body.wanted_tokens} are more than "
                f"the model's context, which has {self.limit}",
                "max_tokens",
                code="context_length_exceeded",
            )


def build_app(service: Service) -> FastAPI:
    """The application without its gate (see limits.py); its lifespan is the engine's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.close()
        service.prompts.close()

    app = FastAPI(
        title="paged_engine",
        version=version("distlab"),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # those two pages load their scripts from the internet
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_openai_routes(app, service)
    _add_operating_routes(app, service)
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    card = service.card

    @app.post("/v1/completions", response_model=Completion, responses={**ERRORS, 200: STREAM})
    async def completions(request: Request, body: CompletionRequest) -> Any:
        body.check(card.id)
        _reserve(service, request, len(body.prompts) * body.samples)
        answer = CompletionAnswer(f"cmpl-{uuid.uuid4().hex}", card.id, body, service.prompts)
        prompts = await service.prompts.of_completion(body)
        return await service.answer(request, body, answer, prompts)

    @app.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: STREAM}
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        body.check(card.id)
        _reserve(service, request, body.samples)
        answer = ChatAnswer(f"chatcmpl-{uuid.uuid4().hex}", card.id, body, service.prompts)
        prompts = await service.prompts.of_chat(body)
        return await service.answer(request, body, answer, prompts)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str) -> Model:
        if model != card.id:
            message = f"The model `{model[:200]}` is not served here; use `{card.id}`"
            raise RequestError(message, "model", 404, "model_not_found")
        return card


def _reserve(service: Service, request: Request, sequences: int) -> None:
    """Room for the request; its call gives the room back, in whatever way it ends."""
    request.state.call.generation = service.engine.generation(sequences)


def _add_operating_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        if problem := service.engine.problem():
            raise Unavailable(problem)
        return Health()

    @app.get("/version", responses=ERRORS)
    async def server_version() -> Version:
        return Version(version=app.version)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**ERRORS, 200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        return Response(service.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(UsageError)
    async def wrong(_: Request, error: UsageError) -> Response:
        if isinstance(error, RequestError):
            return error_response(error.status, str(error), param=error.param, code=error.code)
        first_word = str(error).partition(" ")[0]  # the engine's messages begin with the field
        param = first_word if first_word in PASSED_ON else None
        return error_response(400, str(error), param=param)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = _explain(error.errors())
        return error_response(400, message, param=param)

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        headers = {"retry-after": str(error.retry_after)}
        return error_response(429, str(error), "rate_limit_error", None, "queue_full", headers)

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> Response:
        return error_response(503, str(error), "server_error", None, "unavailable")

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        code, headers = HTTP_CODES.get(error.status_code), dict(error.headers or {})
        return error_response(error.status_code, error.detail, code=code, headers=headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return error_response(500, "The server has a fault; its log says more", "server_error")


def _explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first mistake; all that is said of that field, of its union say."""
    place = [str(part) for part in errors[0]["loc"][1:]]
    if errors[0]["type"] == "json_invalid" or not place:
        return "The body is not a JSON object, or its Content-Type not application/json", None
    field = place[0]
    said = [error["msg"] for error in errors if str(error["loc"][1:2][0]) == field]
    return f"{field}: {', or '.join(dict.fromkeys(said))}", field
