"""CUDA graphs of decode steps: what 300 kernel launches from Python cost, replayed as one.

A step at a small batch takes a GPU less time than Python needs to launch its kernels. A graph holds
the launches of one batch size, with fixed addresses of inputs and outputs; a batch is padded to the
next size that there is, its extra tokens writing to the scratch block.
"""

from typing import Any

import torch
from torch import Tensor

from paged_engine.attention import CacheShape, Plan
from paged_engine.paged_model import PagedModel, StepInputs

WARM_UPS = 2  # torch.compile and Triton compile in the first, which no graph may hold


class DecodeGraphs:
    """A graph for each of a few batch sizes, up to `most` sequences of `most_blocks` blocks."""

    def __init__(
        self,
        model: PagedModel,
        shape: CacheShape,
        device: torch.device,
        most: int,
        most_blocks: int,
    ) -> None:
        scratch = shape.blocks * shape.block_size
        self.tokens = torch.zeros(most, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.slots = torch.full_like(self.tokens, scratch)
        self.lengths = torch.ones(most, dtype=torch.int32, device=device)
        self.tables = self.lengths.new_full((most, most_blocks), shape.blocks)
        self.scratch = scratch
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool: Any = None
        for size in reversed(batch_sizes(most)):  # the largest first: the others fit in its memory
            graph, logits = self._capture(model, size, pool)
            self.graphs[size] = graph, logits
            pool = graph.pool()

    def can_run(self, inputs: StepInputs) -> bool:
        """Whether all of the step are decodes, and no more than the largest graph takes."""
        return not inputs.plan.prefills and inputs.tokens.shape[0] <= self.tokens.shape[0]

    def run(self, inputs: StepInputs) -> Tensor:
        """As `PagedModel`, for inputs that are all decodes; the logits last until the next run."""
        plan, count = inputs.plan, inputs.tokens.shape[0]
        assert plan.tables is not None and plan.lengths is not None
        size = min(size for size in self.graphs if size >= count)
        self.tokens[:count] = inputs.tokens
        self.positions[:count] = inputs.positions
        self.slots[:count] = plan.slots
        self.slots[count:size] = self.scratch
        self.tables[:count, : plan.tables.shape[1]] = plan.tables
        self.lengths[:count] = plan.lengths
        self.lengths[count:size] = 1
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[inputs.wanted]

    def _capture(
        self, model: PagedModel, size: int, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        inputs = StepInputs(
            self.tokens[:size],
            self.positions[:size],
            torch.arange(size, device=self.tokens.device),
            Plan(self.slots[:size], self.tables[:size], self.lengths[:size]),
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                model(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = model(inputs)
        return graph, logits


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8, of 16 from 64 on, and `most` itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    return [size for size in sizes if size < most] + [most]
