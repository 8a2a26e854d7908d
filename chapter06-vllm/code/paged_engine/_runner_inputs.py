"""What a step is, in plain numbers: taken from a batch, sent to other processes, made tensors."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from paged_engine._attention_plan import Planner, moved
from paged_engine.attention import Span
from paged_engine.batch import Batch
from paged_engine.paged_model import StepInputs


@dataclass
class Step:
    """A batch without its sequences: what every process of a tensor-parallel model must know."""

    spans: list[Span]
    tokens: list[Sequence[int]]  # of each span
    samples: list[bool]
    copies: list[tuple[int, int]]

    def to_bytes(self) -> bytes:
        """Integers of 64 bits: counts, copies, and each span with its tokens and blocks."""
        numbers = array("q", [len(self.copies), len(self.spans)])
        for pair in self.copies:
            numbers.extend(pair)
        for span, tokens, samples in zip(self.spans, self.tokens, self.samples, strict=True):
            numbers.extend((span.start, span.length, samples, len(span.blocks)))
            numbers.extend(tokens)
            numbers.extend(span.blocks)
        return numbers.tobytes()

    @classmethod
    def from_bytes(cls, message: bytes) -> "Step":
        numbers = iter(memoryview(message).cast("q"))

        def take(count: int) -> list[int]:
            return [next(numbers) for _ in range(count)]

        num_copies, num_spans = take(2)
        copies = take(2 * num_copies)
        step = cls([], [], [], list(zip(copies[::2], copies[1::2], strict=True)))
        for _ in range(num_spans):
            start, length, samples, blocks = take(4)
            step.tokens.append(take(length))
            step.spans.append(Span(start, length, take(blocks)))
            step.samples.append(bool(samples))
        return step


def step_of(batch: Batch) -> Step:
    """The numbers of `batch`."""
    chunks = batch.chunks
    return Step(
        [Span(chunk.start, chunk.length, chunk.block_table) for chunk in chunks],
        [chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks],
        [chunk.samples for chunk in chunks],
        batch.copies,
    )


def step_inputs(step: Step, planner: Planner) -> StepInputs:
    """The tensors of `step`, its spans in the order in which attention wants them."""
    places = planner.order(step.spans)
    spans = [step.spans[place] for place in places]
    numbers = [
        [token for place in places for token in step.tokens[place]],
        [position for span in spans for position in range(span.start, span.end)],
        _wanted(step, places),
        planner.slots(spans),
    ]
    tokens, positions, wanted, slots = moved(numbers, np.int64, planner.device)
    return StepInputs(tokens, positions, wanted, planner.plan(spans, slots))


def _wanted(step: Step, places: list[int]) -> list[int]:
    """The last token of each span that samples, in the order of the step."""
    ends = accumulate(step.spans[place].length for place in places)
    after = dict(zip(places, ends, strict=True))
    return [after[place] - 1 for place, samples in enumerate(step.samples) if samples]
