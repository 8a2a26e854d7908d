"""One step's work: which tokens of which sequences are computed, and what is copied before.

A batch is plain numbers: the runner makes tensors of them, and with tensor parallelism they travel
to the other processes as they are.
"""

from array import array
from dataclasses import dataclass, field

from paged_engine.request import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens of a sequence from place `start` on, whose keys and values the step computes.

    The chunk that ends with the sequence's last token `samples`: its last logits give the next.
    `block_table` stays valid for this step even if the sequence is cancelled meanwhile.
    """

    start: int
    tokens: list[int]
    block_table: list[int]
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, start: int, length: int) -> "Chunk":
        end = start + length
        samples = end == len(sequence.token_ids)
        return cls(start, sequence.token_ids[start:end], sequence.block_table, samples)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass
class Batch:
    """One step: first the copies of blocks (from, to), in order, then the chunks, all at once.

    `sequences` are those of the chunks, for the scheduler alone.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    completes: set[bytes] = field(default_factory=set)  # hashes of the blocks that get full
    sampled: list[Sequence] = field(default_factory=list)  # who gets a token: see `fork_samples`

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def to_bytes(self) -> bytes:
        """Integers of 64 bits: counts, copies, and each chunk with its tokens and blocks."""
        numbers = array("q", [len(self.copies), len(self.chunks)])
        for pair in self.copies:
            numbers.extend(pair)
        for chunk in self.chunks:
            numbers.extend((chunk.start, chunk.samples, chunk.length, len(chunk.block_table)))
            numbers.extend(chunk.tokens)
            numbers.extend(chunk.block_table)
        return numbers.tobytes()

    @classmethod
    def from_bytes(cls, message: bytes) -> "Batch":
        numbers = iter(memoryview(message).cast("q"))

        def take(count: int) -> list[int]:
            return [next(numbers) for _ in range(count)]

        num_copies, num_chunks = take(2)
        copies = take(2 * num_copies)
        batch = cls(copies=list(zip(copies[::2], copies[1::2], strict=True)))
        for _ in range(num_chunks):
            start, samples, length, blocks = take(4)
            batch.chunks.append(Chunk(start, take(length), take(blocks), bool(samples)))
        return batch
