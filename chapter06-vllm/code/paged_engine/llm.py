"""Offline use, under vLLM's names: prompts in, texts out.

llm = LLM("models/laptop", max_sequences=32)
for answer in llm.generate(["def main", "import"], SamplingParams(max_tokens=20)):
    print(answer.outputs[0].text)
"""

from collections.abc import Iterable
from collections.abc import Sequence as List
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from distlab.errors import UsageError
from paged_engine.config import EngineConfig
from paged_engine.engine import Engine, Output
from paged_engine.request import FinishReason
from paged_engine.sampler import SampledToken
from paged_engine.sampling_params import SamplingParams

Prompt = str | List[int]
Chat = List[dict[str, Any]]  # [{"role": "user", "content": "..."}, ...]


@dataclass
class CompletionOutput:
    """One of a prompt's n answers. `token_times`: seconds since arrival, of each token."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] | None = None
    finish_reason: FinishReason | None = None
    token_times: list[float] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A prompt and its answers; `prompt` is None for one that was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0

    def add(self, output: Output) -> None:
        """Take what a step brought one of the answers."""
        answer = self.outputs[output.index]
        answer.text += output.text
        answer.token_ids += output.token_ids
        answer.token_times += [output.time - output.arrival] * len(output.token_ids)
        answer.finish_reason = output.finish_reason
        if output.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + output.logprobs
        self.num_cached_tokens = output.cached_tokens


class LLM:
    """An engine that is fed with whole lists of prompts; `config` as in `EngineConfig`.

    `close` it, or use `with`. An `engine` that is there already may be given instead of a model.
    """

    def __init__(
        self, model: str | Path | None = None, *, engine: Engine | None = None, **config: Any
    ) -> None:
        if engine is None:
            if model is None:
                raise UsageError("LLM needs a model directory")
            engine = Engine(EngineConfig(model, **config))
        self.engine = engine

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        sampling_params: SamplingParams | List[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer the prompts, in their order: one, or a list; each a text or its token ids.

        `sampling_params`: for all prompts, or one for each. The engine gets all prompts at once.

        Raises:
            UsageError: for a prompt that cannot be answered; then none is.
        """
        asked = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            wanted = [sampling_params or SamplingParams()] * len(asked)
        else:
            wanted = list(sampling_params)
        if len(wanted) != len(asked):
            raise UsageError(f"{len(wanted)} sampling parameters do not fit {len(asked)} prompts")
        answers: dict[str, RequestOutput] = {}
        try:
            for prompt, how in zip(asked, wanted, strict=True):
                answer = self._ask(prompt, how)
                answers[answer.request_id] = answer
            self._run(answers, progress)
        finally:
            for request_id in answers:
                self.engine.cancel(request_id)  # after an error or Ctrl-C; nothing otherwise
        return list(answers.values())

    def chat(
        self,
        messages: Chat | List[Chat],
        sampling_params: SamplingParams | List[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """As `generate`, for a conversation, or a list of them, by the model's chat template."""
        single = bool(messages) and isinstance(messages[0], dict)
        chats = cast(List[Chat], [messages] if single else messages)
        prompts = [self.engine.encode_chat(chat) for chat in chats]
        return self.generate(prompts, sampling_params, progress)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _ask(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        ids = self.engine.encode(prompt)
        request_id = self.engine.add_request(ids, params)
        text = prompt if isinstance(prompt, str) else None
        outputs = [CompletionOutput(index) for index in range(params.n)]
        return RequestOutput(request_id, text, ids, outputs)

    def _run(self, answers: dict[str, RequestOutput], progress: bool) -> None:
        total = sum(len(answer.outputs) for answer in answers.values())
        with _progress_bar(total) if progress else nullcontext() as bar:
            while self.engine.has_work:
                outputs = self.engine.step()
                for output in outputs:
                    answers[output.request_id].add(output)
                if bar:
                    bar.advance(bar.task_ids[0], _finished(outputs))


def _as_list(prompts: Prompt | List[Prompt]) -> list[Prompt]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return cast(list[Prompt], [prompts] if single else list(prompts))


def _finished(outputs: Iterable[Output]) -> int:
    return sum(output.finish_reason is not None for output in outputs)


def _progress_bar(total: int) -> Any:
    from rich.progress import Progress

    bar = Progress(transient=True)
    bar.add_task("sequences", total=total)
    return bar
