"""What a client may ask: the bodies of /v1/completions and /v1/chat/completions, checked strictly.

The names are the OpenAI API's, and vLLM's for what that API has not (top_k, min_p,
repetition_penalty, stop_token_ids, ignore_eos, min_tokens). `null` means that a field is left out,
and so does, in a field that this server has not, a value that asks for nothing (`NEUTRAL`): clients
send back what they were given, `refusal: null` and all, and fill in defaults. Any other value of
such a field is refused: who sends it expects it to work.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distlab.errors import UsageError
from paged_engine.sampling_params import SamplingParams

MOST_LOGPROBS = 20
MOST_SAMPLES = 128
MOST_STOPS = 16
MOST_PROMPTS = 1024
MOST_PARTS = 64
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat may go on until the context is full
PASSED_ON = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
)  # fmt: skip

ANY = object()  # every value of the field asks for nothing that changes an answer
NO_TOOLS: dict[str, Any] = {
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False],
    "functions": [[]], "function_call": ["none", "auto"],
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "logit_bias": [{}],
    "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,  # for OpenAI's own books
    "prompt_cache_retention": ["in_memory"], "prompt_cache_options": [{}],
    "service_tier": ["auto", "default"], "store": [False],
    # vLLM's
    "skip_special_tokens": [True], "spaces_between_special_tokens": [True],
    "include_stop_str_in_output": [False], "use_beam_search": [False], "length_penalty": [1],
    "add_special_tokens": [True], "priority": [0], "return_token_ids": [False],
}  # fmt: skip
NEUTRAL_IN_CHAT = NEUTRAL | NO_TOOLS | {
    "response_format": [{"type": "text"}], "modalities": [["text"]], "reasoning_effort": ["none"],
    "verbosity": ["medium"], "add_special_tokens": [False], "add_generation_prompt": [True],
    "continue_final_message": [False], "documents": [[]], "chat_template_kwargs": [{}],
}  # fmt: skip
NEUTRAL_IN_COMPLETION = NEUTRAL | {
    "suffix": [""], "best_of": [1], "response_format": [{"type": "text"}],
}  # fmt: skip

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class RequestError(UsageError):
    """A client's mistake in the field `param`: status 400, or what `status` says."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Strict(BaseModel):
    """No conversion between types, no infinite numbers, no unknown fields that ask for anything."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, Any]] = {}  # of fields that are not here: values that ask nothing

    @model_validator(mode="before")
    @classmethod
    def no_unknown_field(cls, data: Any) -> Any:
        """Raise on the first one; pydantic would make an error object for each of a million."""
        if not isinstance(data, dict):
            return data
        known = {}
        for name, value in data.items():
            if name in cls.model_fields:
                known[name] = value
            elif value is not None and not cls._asks_nothing(name, value):
                raise RequestError(cls._refusal(name), name[:100])
        return known

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        """The neutral values too: what the schema does not allow is refused, and nothing else."""
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        described["additionalProperties"] = {"type": "null"}
        for name, values in cls.neutral.items():
            allowed = {} if values is ANY else {"enum": [*values, None]}
            described.setdefault("properties", {})[name] = allowed
        return schema

    @classmethod
    def _asks_nothing(cls, name: str, value: Any) -> bool:
        values = cls.neutral.get(name, ())
        # True equals 1 in Python
        return values is ANY or any(type(v) is type(value) and v == value for v in values)

    @classmethod
    def _refusal(cls, name: str) -> str:
        if name in cls.neutral:
            return f"{name} is not supported here; leave it out"
        return f"Unrecognized request argument supplied: {name[:100]}"


class StreamOptions(Strict):
    neutral = {"include_obfuscation": [False], "continuous_usage_stats": [False]}

    include_usage: bool | None = None  # one more chunk at the end, with the token counts


class GenerationRequest(Strict):
    """What the two endpoints have in common."""

    model: str | None = None  # the served one if left out
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Literal[""] | Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)]
    ) | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None  # taken, and used for nothing

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        raise NotImplementedError

    def check(self, model: str) -> None:
        """Raise RequestError where fields that are right by themselves do not fit together."""
        if self.model not in (None, model):
            raise RequestError(
                f"The model `{str(self.model)[:200]}` is not served here; use `{model}`",
                "model",
                404,
                "model_not_found",
            )
        if self.include_usage and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")

    def sampling(self, default_max_tokens: int) -> SamplingParams:
        """Raises UsageError for what only the engine can judge, such as min_tokens > max_tokens."""
        given = {name: getattr(self, name) for name in PASSED_ON} | {"stop": self.stop or None}
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            max_tokens=self.wanted_tokens or default_max_tokens,
            logprobs=self.wanted_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """One prompt as a string or as token ids, or a list of such prompts."""

    neutral = NEUTRAL_IN_COMPLETION

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item, arg-type]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def check(self, model: str) -> None:
        super().check(model)
        if self.echo:
            raise RequestError("echo is not supported; put the prompt before the text", "echo")


class TextPart(Strict):
    neutral = {"prompt_cache_breakpoint": [{}], "annotations": [[]]}

    type: Literal["text"]
    text: str


class Message(Strict):
    neutral = {"tool_calls": [[]], "annotations": [[]], "refusal": [""], "audio": [{}],
               "function_call": [{}], "reasoning_content": [""]}  # fmt: skip

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    neutral = NEUTRAL_IN_CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, model: str) -> None:
        super().check(model)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_tokens not in (None, self.wanted_tokens):
            raise RequestError(
                "max_tokens and max_completion_tokens differ; give one", "max_tokens"
            )
