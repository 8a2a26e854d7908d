"""A fake model for the scheduler: it reads what it knows of a sequence from a paged cache."""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from paged_engine.batch import Batch, SchedulerConfig
from paged_engine.block_manager import BlockManager
from paged_engine.request import Request, Sequence, Status
from paged_engine.sampling_params import SamplingParams
from paged_engine.scheduler import Scheduler

VOCABULARY = 4  # so few that different requests come to the same tokens, and share blocks
EOS = 0
MOMENTS = ("before the step", "before it computes", "before sampling", "before the update")


def key_value(before: int, token: int) -> int:
    """What the cache holds of a token: as in a transformer, it depends on all tokens before."""
    digest = hashlib.sha256(array("q", [before, token]).tobytes()).digest()
    return int.from_bytes(digest[:7])


def next_token(cached: list[int], index: int) -> int:
    """The fake model: a hash of all that is in the cache; another for each sample."""
    return key_value(sum(cached), index) % VOCABULARY


def expected(request: Request, index: int, max_length: int) -> list[int]:
    """What the fake model gives this sample when it runs alone, without a cache."""
    params, tokens, cached = request.params, list(request.prompt_ids), []
    while True:
        while len(cached) < len(tokens):
            cached.append(key_value(cached[-1] if cached else 0, tokens[len(cached)]))
        tokens.append(next_token(cached, index))
        output = tokens[len(request.prompt_ids) :]
        stopped = tokens[-1] in request.eos_token_ids and not params.ignore_eos
        stopped &= len(output) >= params.min_tokens
        if stopped or len(output) == params.max_tokens or len(tokens) == max_length:
            return output


class FakeRunner:
    """A paged cache of numbers. Writing and reading go through the block tables only."""

    def __init__(self, blocks: BlockManager) -> None:
        self.size = blocks.block_size
        self.slots = [[-1] * self.size for _ in range(blocks.num_blocks)]

    def execute(self, batch: Batch) -> list[list[int]]:
        """For each chunk that samples, all that its sequence has in the cache."""
        self._copy(batch.copies)
        before = [list(block) for block in self.slots]
        for chunk in batch.chunks:
            value = 0
            if chunk.start > 0:  # what this very step writes for others cannot be read yet
                block, slot = divmod(chunk.start - 1, self.size)
                value = before[chunk.block_table[block]][slot]
            for position in range(chunk.start, chunk.end):
                value = key_value(value, chunk.sequence.token_ids[position])
                block, slot = divmod(position, self.size)
                self.slots[chunk.block_table[block]][slot] = value
        return [self._read(chunk.block_table, chunk.end) for chunk in batch.chunks if chunk.samples]

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """All at once, as an indexed copy on a GPU does it."""
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets)
        for (_, target), content in zip(
            copies, [list(self.slots[source]) for source, _ in copies], strict=True
        ):
            self.slots[target] = content

    def _read(self, block_table: list[int], length: int) -> list[int]:
        slots = [value for block in block_table for value in self.slots[block]]
        return slots[:length]


@dataclass
class Engine:
    """Scheduler, blocks and fake model, with every invariant asserted at every step."""

    scheduler: Scheduler
    runner: FakeRunner = field(init=False)
    order: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = FakeRunner(self.scheduler.blocks)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.order.append(request)

    def step(self, at: Callable[[str], None] = lambda moment: None) -> Batch:
        """One step; `at` may interfere at each of MOMENTS."""
        at("before the step")
        batch = self.scheduler.schedule()
        self._check_batch(batch)
        at("before it computes")
        rows = self.runner.execute(batch)
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
        chunks = self._ranks([chunk.sequence for chunk in batch.chunks])
        assert chunks == sorted(set(chunks))
        if running:
            assert chunks[0] == running[0], "the first to arrive got no token"
        else:
            assert not waiting, "nobody runs, though somebody waits"
        for chunk in batch.chunks:
            assert chunk.length > 0 and chunk.start == chunk.sequence.computed
            assert chunk.samples == (chunk.end == len(chunk.sequence.token_ids))
            assert len(chunk.block_table) * self.runner.size >= chunk.end

    def _ranks(self, sequences: list[Sequence]) -> list[tuple[int, int]]:
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
    num_blocks: int = 64, block_size: int = 4, caching: bool = True, **limits: int
) -> Engine:
    return Engine(
        Scheduler(SchedulerConfig(**limits), BlockManager(num_blocks, block_size, caching))
    )


def request_of(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1) -> Request:
    return Request(name, prompt, SamplingParams(n=n, max_tokens=max_tokens))


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + position * position) % VOCABULARY for position in range(length)]


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    """(request, start, length) of each chunk."""
    return [(c.sequence.request.request_id, c.start, c.length) for c in batch.chunks]


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [one.request.request_id for one in sequences]
