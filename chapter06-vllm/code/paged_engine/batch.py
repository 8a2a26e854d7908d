"""One step's work: which tokens of which sequences, and the limits within which it is chosen."""

from dataclasses import dataclass, field, fields

from distlab.errors import UsageError
from paged_engine.request import Sequence


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step (tokens, sequences) and of a sequence (prompt and output, in tokens)."""

    max_batch_tokens: int = 2048
    max_sequences: int = 64
    max_model_len: int = 2048

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise UsageError(f"{limit.name} {value} is not possible; it must be 1 or more")


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, whose keys and values the step computes.

    The chunk that ends with the sequence's last token `samples`: its last logits give the next.
    `block_table` stays valid for this step even if the sequence is cancelled meanwhile.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    block_table: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.block_table = self.sequence.block_table

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class Batch:
    """One step: first the copies of blocks (from, to), in order, then the chunks, all at once."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    completes: set[bytes] = field(default_factory=set)  # hashes of the blocks that get full
    sampled: list[Sequence] = field(default_factory=list)  # who gets a token: see `fork_samples`

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)
