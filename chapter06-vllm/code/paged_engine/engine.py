"""The engine: requests go in, and each step brings every running sequence one token further.

    engine = Engine(EngineConfig("models/laptop"))
    engine.add_request("The capital of France is", SamplingParams(max_tokens=20))
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="")

One thread at a time may use it; `paged_engine.async_engine` lets many clients share one.
"""

import time
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from distlab.errors import UsageError
from distlab.model_config import ModelConfig
from paged_engine.batch import Batch
from paged_engine.block_manager import BlockManager, block_policy
from paged_engine.config import EngineConfig
from paged_engine.detokenizer import IncrementalDetokenizer
from paged_engine.loading import chat_ids, load_tokenizer, plain_ids, text_ids
from paged_engine.request import FinishReason, Request, Sequence
from paged_engine.sampler import SampledToken, sample
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler


@dataclass(slots=True)
class Output:
    """What a step brought one sequence: a token, and the text that is certain with it.

    `text` may be empty while a character or a possible stop string is incomplete; the last token's
    output has the rest and the `finish_reason`. `arrival` and `time` are `time.monotonic()` when
    the request came and when the step ended. `cached_tokens`: of the prompt, by the prefix cache.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[SampledToken] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    arrival: float
    time: float


@dataclass(frozen=True)
class EngineStats:
    """The engine now (sequences, share of the cache in use), and its counters since the start.

    Queries and hits of the prefix cache are in tokens. `prompt_tokens` counts prompts whose first
    token is out.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int


class Runner(Protocol):
    """What the engine asks of a model: `paged_engine.runner.ModelRunner`, or a test's."""

    config: ModelConfig
    num_blocks: int
    max_model_len: int
    eos_token_ids: frozenset[int]

    @property
    def description(self) -> str: ...

    def execute(self, batch: Batch) -> Tensor: ...

    def close(self) -> None: ...


class Engine:
    """Owns tokenizer, scheduler, block manager and model runner; `close` it, or use `with`.

    Another `runner`, `tokenizer` or manager of `blocks` may be brought. A model without tokenizer
    takes token ids only, and its outputs have no text.

    Raises:
        UsageError, RunError: for a model or sizes that cannot be served, in one line.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner | None = None,
        tokenizer: Any = None,
        blocks: BlockManager | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(config.model) if tokenizer is None else tokenizer
        self.runner = _load_runner(config) if runner is None else runner
        self.config = replace(config, max_model_len=self.runner.max_model_len)
        policy = block_policy(config.prefix_cache)
        sizes = (self.runner.num_blocks, config.block_size, config.prefix_caching)
        self.blocks = policy(*sizes) if blocks is None else blocks
        self.scheduler = Scheduler(self.config, self.blocks)
        self._requests: dict[str, Request] = {}
        self._texts: dict[Sequence, IncrementalDetokenizer] = {}
        self._added = self._steps = self._prompt_tokens = self._generation_tokens = 0

    @property
    def max_model_len(self) -> int:
        """The most tokens, prompt and output together, that a sequence may have."""
        return self.scheduler.max_length

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add_request(
        self,
        prompt: str | List[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a request; returns its id.

        Raises:
            UsageError: it could never be answered; the engine goes on as if it had not come.
        """
        request = self._request(prompt, params or SamplingParams(), request_id)
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        return request.request_id

    def reserve(
        self, prompt: List[int], params: SamplingParams, request_id: str
    ) -> Sequence | None:
        """Blocks for a prompt that another engine computes; None: there is no room for it now.

        The keys and values of the tokens from `computed` on are to be written into the sequence's
        `block_table`, by `runner.cache`; then `adopt` it. `cancel` gives it up.

        Raises:
            UsageError: as `add_request`; and for several samples, which share what is computed.
        """
        if params.n > 1:
            raise UsageError(f"n {params.n} samples cannot be moved; use n 1")
        request = self._request(prompt, params, request_id)
        if not self.scheduler.reserve(request):
            return None
        self._requests[request_id] = request
        return request.sequences[0]

    def adopt(self, request_id: str, token: int) -> Output:
        """Go on with a reserved request, whose prompt is written, from its first `token` on."""
        [sequence] = self._requests[request_id].sequences
        self.scheduler.adopt(sequence, token)
        return self._output(sequence, SampledToken(token), time.monotonic())

    def _request(
        self, prompt: str | List[int], params: SamplingParams, request_id: str | None
    ) -> Request:
        prompt_ids = self.encode(prompt)
        params = self._with_special_stops(params)
        self._added += 1
        name = f"request-{self._added}" if request_id is None else request_id
        return Request(name, prompt_ids, params, time.monotonic(), self.eos_token_ids)

    def encode(self, prompt: str | List[int]) -> list[int]:
        """The prompt's token ids. Raises `UsageError` for ids that the model does not have."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(f"{self.config.model} has no tokenizer; give token ids")
            return text_ids(self.tokenizer, prompt)
        ids = plain_ids(prompt)
        vocabulary = self.runner.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise UsageError(f"token id {wrong} is not in the vocabulary of {vocabulary} tokens")
        return ids

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends an answer: the model's configuration may name one, its tokenizer another."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return self.runner.eos_token_ids | ({own} if own is not None else set())

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        return frozenset(getattr(self.tokenizer, "all_special_tokens", ()))

    def _with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """A stop string that is a special token's name never is in a text: its id stops instead."""
        special = [stop for stop in params.stop if stop in self._special_tokens]
        if not special:
            return params
        ids = self.tokenizer.convert_tokens_to_ids(special)
        return replace(params, stop_token_ids=(*params.stop_token_ids, *ids))

    def encode_chat(self, messages: List[dict[str, Any]]) -> list[int]:
        """The token ids of `[{"role": ..., "content": ...}, ...]`, ready for the answer.

        Raises:
            UsageError: the model has no chat template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"{self.config.model} has no chat template; use generate with a prompt instead"
            )
        return chat_ids(self.tokenizer, messages)

    def cancel(self, request_id: str) -> bool:
        """Forget a request, of which no further output comes; False if it is not here."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self.scheduler.cancel(request_id)
        for sequence in request.sequences:
            self._texts.pop(sequence, None)
        return True

    def step(self) -> list[Output]:
        """Compute one batch; returns the tokens that it brought, perhaps none."""
        batch = self.scheduler.schedule()
        if not batch.chunks:
            return []
        logits = self.runner.execute(batch)
        pairs = self.scheduler.fork_samples(batch)
        sequences = [sequence for _, sequence in pairs]
        rows = [row for row, _ in pairs]
        if rows != list(range(len(logits))):  # samples of one prompt share its row
            logits = logits[rows]
        sampled = sample(logits, sequences) if sequences else []
        self.scheduler.update(batch, [token.token for token in sampled])
        self._steps += 1
        now = time.monotonic()
        return [
            self._output(sequence, token, now)
            for sequence, token in zip(sequences, sampled, strict=True)
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_blocks=self.blocks.num_blocks,
            kv_cache_usage=1 - self.blocks.num_free / self.blocks.num_blocks,
            prefix_cache_queries=self.blocks.queries,
            prefix_cache_hits=self.blocks.hits,
            num_preemptions=self.scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
        )

    def close(self) -> None:
        """Give up all requests, and end the runner with its processes."""
        for request_id in list(self._requests):
            self.cancel(request_id)
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _output(self, sequence: Sequence, sampled: SampledToken, now: float) -> Output:
        request = sequence.request
        text = self._new_text(sequence, sampled.token)
        logprobs = None if request.params.logprobs is None else [sampled]
        if logprobs:
            sequence.logprobs += logprobs
        self._generation_tokens += 1
        if sequence.index == 0 and sequence.num_output == 1:
            self._prompt_tokens += sequence.prompt_length
        if sequence.finished:
            self._texts.pop(sequence, None)
            if request.finished:
                self._requests.pop(request.request_id, None)
        return Output(
            request_id=request.request_id,
            index=sequence.index,
            text=text,
            token_ids=[sampled.token],
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            arrival=request.arrival,
            time=now,
        )

    def _new_text(self, sequence: Sequence, token: int) -> str:
        """The text that `token` makes certain; a stop string in it ends the sequence."""
        if self.tokenizer is None:
            return ""
        detokenizer = self._texts.get(sequence)
        if detokenizer is None:
            detokenizer = self._texts[sequence] = self._new_detokenizer(sequence)
        # The token that stops a sequence is not part of its text.
        text = "" if sequence.finish_reason == "stop" else detokenizer.append(token)
        if sequence.finished:
            text += detokenizer.finish()
        if detokenizer.stopped is not None:
            self.scheduler.finish(sequence, "stop")
            sequence.finish_reason = "stop"  # also if it has reached its length with this token
        return text

    def _new_detokenizer(self, sequence: Sequence) -> IncrementalDetokenizer:
        params = sequence.params
        prompt_ids = sequence.request.prompt_ids
        return IncrementalDetokenizer(self.tokenizer, params.stop, prompt_ids, params.min_tokens)


def _load_runner(config: EngineConfig) -> Runner:
    from paged_engine.runner import ModelRunner  # brings the model's code, which is slow to import

    return ModelRunner(config)
