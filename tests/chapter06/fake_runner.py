"""A model without weights, and a scheduler that runs on it with every invariant asserted.

The next token is a function of all that the paged cache holds of a sequence, and what it holds of a
token depends on all tokens before it, as in a transformer. Whoever hands out a block twice, copies
too late, or forgets to compute a token gets other tokens than a run alone.
"""

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paged_engine.batch import Batch
from paged_engine.block_manager import block_policy
from paged_engine.config import EngineConfig
from paged_engine.request import Request, Sequence, Status
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler

VOCABULARY = 4  # so few that different requests come to the same tokens, and share blocks
EOS = 0
MOMENTS = ("before the step", "before it computes", "before sampling", "before the update")


def key_value(before: int, token: int) -> int:
    """What the cache holds of a token after one of which it holds `before`; 40 bits."""
    digest = hashlib.sha256(array("q", [before, token]).tobytes()).digest()
    return int.from_bytes(digest[:5])


def keys_values(tokens: Iterable[int], before: int = 0) -> list[int]:
    values = []
    for token in tokens:
        before = key_value(before, token)
        values.append(before)
    return values


class FakeRunner:
    """Stands for `paged_engine.runner.ModelRunner`; counts `steps` and the `tokens` computed.

    Writing and reading go through the block tables only. The logits after a sequence are a row of
    `table`; each step lasts `step_seconds` more than it must.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int = 512,
        table: Tensor | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_model_len, self.step_seconds = max_model_len, step_seconds
        self.table = torch.empty(0, VOCABULARY) if table is None else table
        self.block_bytes = block_size * 8
        self.config = SimpleNamespace(vocab_size=self.table.shape[1])
        self.eos_token_ids = frozenset({EOS})
        self.description = "a fake runner"
        self.cache = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.steps = self.tokens = 0

    def execute(self, batch: Batch) -> Tensor:
        """Logits [chunks that sample, vocabulary], as `ModelRunner.execute`."""
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.steps += 1
        self.tokens += batch.num_tokens
        rows = [int(cached.sum()) % len(self.table) for cached in self.cached(batch)]
        return self.table[rows].clone()

    def cached(self, batch: Batch) -> list[np.ndarray]:
        """Compute a batch; for each chunk that samples, all that its sequence has in the cache."""
        targets, sources = [to for _, to in batch.copies], [here for here, _ in batch.copies]
        assert len(set(targets)) == len(targets)
        self.cache[targets] = self.cache[sources]  # all at once, as on a GPU
        # What this very step writes for others cannot be read yet.
        before = [self._held(chunk.block_table, chunk.start)[-1:] for chunk in batch.chunks]
        for chunk, last in zip(batch.chunks, before, strict=True):
            places = np.arange(chunk.start, chunk.end)
            blocks = np.asarray(chunk.block_table)[places // self.block_size]
            values = keys_values(chunk.tokens, int(last.sum()))  # 0 where nothing is before
            self.cache[blocks, places % self.block_size] = values
        sampling = [chunk for chunk in batch.chunks if chunk.samples]
        return [self._held(chunk.block_table, chunk.end) for chunk in sampling]

    def close(self) -> None:
        pass

    def _held(self, block_table: list[int], length: int) -> np.ndarray:
        return self.cache[block_table].reshape(-1)[:length]


def next_token(cached: Iterable[int], index: int) -> int:
    """What the scheduler's tests sample: a hash of all that is in the cache and of the sample."""
    return key_value(int(sum(cached)), index) % VOCABULARY


def expected(request: Request, index: int, max_length: int) -> list[int]:
    """What the fake model gives this sample when it runs alone, without a cache."""
    params, tokens = request.params, list(request.prompt_ids)
    cached: list[int] = []
    while True:
        while len(cached) < len(tokens):
            cached.append(key_value(cached[-1] if cached else 0, tokens[len(cached)]))
        tokens.append(next_token(cached, index))
        output = tokens[len(request.prompt_ids) :]
        stopped = tokens[-1] in request.eos_token_ids and not params.ignore_eos
        stopped &= len(output) >= params.min_tokens
        if stopped or len(output) == params.max_tokens or len(tokens) == max_length:
            return output


@dataclass
class Engine:
    """Scheduler, blocks and fake model, with every invariant asserted at every step."""

    scheduler: Scheduler
    runner: FakeRunner = field(init=False)
    order: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.scheduler.blocks
        self.runner = FakeRunner(blocks.num_blocks, blocks.block_size)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.order.append(request)

    def step(self, at: Callable[[str], None] = lambda moment: None) -> Batch:
        """One step; `at` may interfere at each of MOMENTS."""
        at("before the step")
        batch = self.scheduler.schedule()
        self._check_batch(batch)
        at("before it computes")
        rows = self.runner.cached(batch)
        at("before sampling")
        pairs = self.scheduler.fork_samples(batch)
        tokens = [next_token(rows[row], sequence.index) for row, sequence in pairs]
        self.scheduler.check()
        at("before the update")
        finished = self.scheduler.update(batch, tokens)
        assert all(sequence.status is Status.FINISHED for sequence in finished)
        self.scheduler.check()
        return batch

    def run(self, limit: int = 1000) -> None:
        while self.scheduler.requests:
            self.step()
            limit -= 1
            assert limit > 0, "a request starves"

    def _check_batch(self, batch: Batch) -> None:
        scheduler = self.scheduler
        scheduler.check()
        assert batch.num_tokens <= scheduler.config.max_batch_tokens
        assert scheduler.num_running <= scheduler.config.max_sequences
        running, waiting = self._ranks(scheduler.running), self._ranks(scheduler.waiting)
        assert running + waiting == sorted(running + waiting), "not in the order of arrival"
        chunks = self._ranks(batch.sequences)
        assert chunks == sorted(set(chunks))
        if running:
            assert chunks[0] == running[0], "the first to arrive got no token"
        else:
            assert not waiting, "nobody runs, though somebody waits"
        for chunk, sequence in zip(batch.chunks, batch.sequences, strict=True):
            assert chunk.length > 0 and chunk.start == sequence.computed
            assert chunk.tokens == sequence.token_ids[chunk.start : chunk.end]
            assert chunk.samples == (chunk.end == len(sequence.token_ids))
            assert len(chunk.block_table) * self.runner.block_size >= chunk.end

    def _ranks(self, sequences: Iterable[Sequence]) -> list[tuple[int, int]]:
        return [(self.order.index(one.request), one.index) for one in sequences]

    def check_outputs(self) -> None:
        """What ended by itself has exactly its tokens, what was cancelled the first of them."""
        for request in self.order:
            for one in request.sequences:
                alone = expected(request, one.index, self.scheduler.max_length)
                if one.finish_reason == "cancelled":
                    assert one.output_ids == alone[: one.num_output]
                else:
                    assert one.output_ids == alone


def engine_of(
    num_blocks: int = 64,
    block_size: int = 4,
    caching: bool = True,
    policy: str = "hash",
    **limits: Any,
) -> Engine:
    config = EngineConfig("no model", prefix_cache=policy, **limits)
    return Engine(Scheduler(config, block_policy(policy)(num_blocks, block_size, caching)))


def request_of(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1) -> Request:
    return Request(name, prompt, SamplingParams(n=n, max_tokens=max_tokens))


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + position * position) % VOCABULARY for position in range(length)]


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    """(request, start, length) of each chunk."""
    return [
        (sequence.request.request_id, chunk.start, chunk.length)
        for chunk, sequence in zip(batch.chunks, batch.sequences, strict=True)
    ]


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [one.request.request_id for one in sequences]
