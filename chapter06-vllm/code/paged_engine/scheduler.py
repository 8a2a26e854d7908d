"""Which tokens the next step computes: continuous batching, chunked prefill, preemption.

A step takes one token of every running sequence and fills the rest of its token budget with
prompts, or parts of them (Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference
with Sarathi-Serve", OSDI 2024). First come, first served: `running` and `waiting` are each in the
order of arrival, and who runs arrived before all who wait.

    batch = scheduler.schedule()
    logits = runner.execute(batch)               # a row for each chunk that `samples`
    pairs = scheduler.fork_samples(batch)        # (row, sequence) of each token to be chosen
    finished = scheduler.update(batch, tokens)   # one token for each pair
"""

from collections import deque
from collections.abc import Sequence as Ordered

from distlab.errors import UsageError
from paged_engine.batch import Batch, Chunk
from paged_engine.block_manager import BlockManager
from paged_engine.config import EngineConfig
from paged_engine.request import FinishReason, Request, Sequence, Status


class Scheduler:
    """Admits requests, chooses each step's tokens, and gives up what has to wait for blocks.

    Of `config` it obeys `max_batch_tokens`, `max_sequences` and `max_model_len`.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        room = blocks.num_blocks * blocks.block_size
        self.max_length = min(config.max_model_len or room, room)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.arriving: dict[Sequence, None] = {}  # an ordered set: their prompts come from outside
        self.requests: dict[str, Request] = {}
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UsageError: it could never run: empty, too long, too many samples, or a used id.
        """
        self._refuse_impossible(request)
        self.requests[request.request_id] = request
        self.waiting.append(request.sequences[0])  # the others fork off once it has its prompt

    def reserve(self, request: Request) -> bool:
        """Give a request its prompt's blocks, which another engine fills; False: no room now.

        What the prefix cache has is shared as ever: the sequence's `computed` tokens are there.
        """
        self._refuse_impossible(request)
        [sequence] = request.sequences
        full = len(self.running) + len(self.arriving) >= self.config.max_sequences
        if full or not self.blocks.fits(sequence, spare=len(self.running) + len(self.arriving)):
            return False
        self.blocks.match_prefix(sequence)
        copies = self.blocks.allocate(sequence, len(sequence.token_ids))
        assert copies == [], "what fits has its blocks, and nobody writes into a shared one"
        self.requests[request.request_id] = request
        self.arriving[sequence] = None
        return True

    def adopt(self, sequence: Sequence, token: int) -> None:
        """Run an arriving sequence whose prompt has come whole, with the `token` after it."""
        del self.arriving[sequence]
        self.blocks.computed(sequence, len(sequence.token_ids))
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        sequence.token_ids.append(token)
        if (reason := self._finish_reason(sequence, token)) is not None:
            self.finish(sequence, reason)

    def cancel(self, request_id: str) -> bool:
        """End a request at any moment, even while its batch computes; False if it is not here."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in request.sequences:
            self.finish(sequence, "cancelled")
        return True

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and free its blocks; nothing happens if it has ended already."""
        if sequence.finished:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.blocks.free(sequence)
        elif sequence in self.arriving:
            del self.arriving[sequence]
            self.blocks.free(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        if sequence.request.finished:
            del self.requests[sequence.request.request_id]

    def schedule(self) -> Batch:
        """The next step. It is empty only if there is nothing left to do."""
        batch = Batch()
        budget = self.config.max_batch_tokens
        position = 0
        while position < len(self.running) and budget > 0:
            length = self._schedule_chunk(self.running[position], budget, batch)
            if length == 0:
                return batch  # the latest arrived waits, with its blocks, for those before it
            budget -= length
            position += 1
        self._admit(budget, batch)
        return batch

    def fork_samples(self, batch: Batch) -> list[tuple[int, Sequence]]:
        """For each token to be chosen: the row of its logits, and the sequence that gets it.

        When a prompt is done, the request's further samples are forked off, and share its row.
        """
        pairs = []
        chunks = zip(batch.chunks, batch.sequences, strict=True)
        sampling = [(sequence, chunk.end) for chunk, sequence in chunks if chunk.samples]
        for row, (sequence, end) in enumerate(sampling):
            if sequence.finished:  # cancelled since
                continue
            pairs.append((row, sequence))
            if _is_unforked(sequence):
                pairs += [(row, child) for child in self._fork(sequence, end)]
        batch.sampled = [sequence for _, sequence in pairs]
        return pairs

    def update(self, batch: Batch, tokens: Ordered[int]) -> list[Sequence]:
        """Take the step's results: one token for each pair of `fork_samples`, in its order.

        Returns the sequences that ended: by a stop token, or by one of the limits of length.
        """
        for chunk, sequence in zip(batch.chunks, batch.sequences, strict=True):
            if not sequence.finished:
                self.blocks.computed(sequence, chunk.end)
        finished = []
        for sequence, token in zip(batch.sampled, tokens, strict=True):
            if sequence.finished:
                continue
            sequence.token_ids.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def check(self) -> None:
        """Assert the invariants of blocks and queues: slow, for tests."""
        self.blocks.check()
        owners = {*self.running, *self.arriving}
        assert self.blocks.owners.keys() == owners, "who owns blocks runs, and reverse"

    def _schedule_chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Put the sequence's next tokens into the batch; returns how many."""
        start = sequence.computed
        length = min(len(sequence.token_ids) - start, budget)
        copies = self._allocate(sequence, start + length)
        if copies is None:
            return 0
        batch.chunks.append(Chunk.of(sequence, start, length))
        batch.sequences.append(sequence)
        batch.copies += copies
        batch.completes.update(self.blocks.completed(sequence, start + length))
        return length

    def _allocate(self, sequence: Sequence, upto: int) -> list[tuple[int, int]] | None:
        """Blocks for the tokens, taken from the latest arrived as long as there are too few."""
        while (copies := self.blocks.allocate(sequence, upto)) is None:
            victim = self.running[-1]
            if victim is sequence:
                return None
            self._preempt(victim)
        return copies

    def _preempt(self, sequence: Sequence) -> None:
        """Take all its blocks; its tokens are computed again when its turn comes."""
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int, batch: Batch) -> None:
        """Start waiting sequences, in order, while tokens, places and blocks last.

        All tokens of a sequence must have room, though only a chunk is computed now, and one block
        for each that runs must remain: otherwise it would be preempted before it got anywhere.
        One whose next block is computed in this very step waits a step, and finds it in the cache.
        """
        if not self.waiting:
            return
        places = sum(_places(sequence) for sequence in self.running)
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            places += _places(sequence)
            if places > self.config.max_sequences:
                return
            if not self.blocks.fits(sequence, spare=len(self.running)):
                return
            if self.blocks.first_missing(sequence) in batch.completes:
                return
            self.running.append(self.waiting.popleft())
            sequence.status = Status.RUNNING
            cached = self.blocks.match_prefix(sequence)
            if sequence.preemptions == 0:
                sequence.cached_tokens = cached
            budget -= self._schedule_chunk(sequence, budget, batch)

    def _fork(self, parent: Sequence, computed: int) -> list[Sequence]:
        children = parent.request.sequences[1:]
        for child in children:
            self.blocks.fork(parent, child)
            child.computed = computed
            child.status = Status.RUNNING
            child.cached_tokens = parent.cached_tokens
        position = self.running.index(parent) + 1
        self.running[position:position] = children
        return children

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params, request = sequence.params, sequence.request
        stops = token in params.stop_token_ids
        stops |= token in request.eos_token_ids and not params.ignore_eos
        if stops and sequence.num_output >= params.min_tokens:
            return "stop"
        full = len(sequence.token_ids) >= self.max_length
        return "length" if full or sequence.num_output >= params.max_tokens else None

    def _refuse_impossible(self, request: Request) -> None:
        length, samples = len(request.prompt_ids), request.params.n
        if request.request_id in self.requests:
            raise UsageError(f"request id {request.request_id!r} is in use; choose another")
        if length == 0:
            raise UsageError("the prompt has no tokens; give at least one")
        if length + 1 > self.max_length:
            limit = "the model's length" if self._model_limits() else "the KV cache"
            raise UsageError(
                f"a prompt of {length} tokens and one more do not fit into {limit}, "
                f"{self.max_length} tokens; shorten the prompt"
            )
        if samples > self.config.max_sequences:
            most = self.config.max_sequences
            raise UsageError(f"n {samples} is more than --max-sequences {most}; use {most} at most")

    def _model_limits(self) -> bool:
        return self.max_length == self.config.max_model_len


def _is_unforked(sequence: Sequence) -> bool:
    """Whether it computes a prompt for all samples of its request, which fork off it later."""
    return sequence.num_output == 0


def _places(sequence: Sequence) -> int:
    return sequence.params.n if _is_unforked(sequence) else 1
