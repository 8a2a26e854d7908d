"""What a step is, in plain numbers: taken from a batch, sent to other processes, made tensors."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_engine._attention_plan import Planner
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
    tokens = [token for place in places for token in step.tokens[place]]
    positions = [position for span in spans for position in range(span.start, span.end)]
    return StepInputs(
        tokens=torch.tensor(tokens).to(planner.device),
        positions=torch.tensor(positions).to(planner.device),
        wanted=_wanted(step, places).to(planner.device),
        plan=planner.plan(spans),
    )


def _wanted(step: Step, places: list[int]) -> Tensor:
    """The last token of each span that samples, in the order of the step."""
    last: dict[int, int] = {}
    end = 0
    for place in places:
        end += step.spans[place].length
        last[place] = end - 1
    samples = [place for place, samples in enumerate(step.samples) if samples]
    return torch.tensor([last[place] for place in samples], dtype=torch.long)
