"""One process's part of the model and its cache: what makes a batch's logits.

A batch becomes tensors once (`step_inputs`). The decodes of a small batch take a GPU less time than
Python needs to launch their kernels, so CUDA graphs hold the launches of a few batch sizes.
"""

from itertools import accumulate
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from paged_engine.attention import (
    COMPILED_CHUNK,
    CacheShape,
    PagedCache,
    Plan,
    Planner,
    Span,
    has_gpu_kernel,
    moved,
)
from paged_engine.batch import Batch
from paged_engine.config import EngineConfig
from paged_engine.layer_stack import LayerStack
from paged_engine.loading import DTYPES, Part, Shape, load_weights, read_shape
from paged_engine.native import native
from paged_engine.paged_model import PagedModel, Sharing, StepInputs

CPU_SHARE = 0.25  # of the available memory: the cache of a machine that does other things too
CUDA_SHARE = 0.9  # of the device's memory: weights, activations and cache together
WARM_UPS = 2  # torch.compile and Triton compile in the first, which no graph may hold


class Shard:
    """Weights first, so that what they leave of the memory is known; then the cache.

    In `config` all is decided: a dtype, cpu or cuda (process r of several takes cuda:r), a length.
    """

    def __init__(self, config: EngineConfig, part: Part, sharing: Sharing | None = None) -> None:
        assert config.max_model_len is not None
        self.config, self.part = config, part
        self.max_model_len = config.max_model_len
        self.sharing = sharing or Sharing()
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", part.rank)
            torch.cuda.set_device(self.device)
        self.shape: Shape = read_shape(config.model)
        self.dtype = DTYPES[config.dtype]
        # A CPU computes in float32 whatever the weights and the cache are kept in: less memory is
        # read, and nothing is lost where the processor has no instructions for narrow types.
        self.activations = torch.float32 if self.device.type == "cpu" else self.dtype
        self.weights = load_weights(config.model, self.shape, self.dtype, self.device, self.part)
        self.kernel, self.kernel_chunk = self._kernel()

    def cache_shape(self, blocks: int) -> CacheShape:
        """The part of a cache of `blocks` blocks that this process holds."""
        model = self.shape.config
        return CacheShape(
            layers=model.num_hidden_layers,
            blocks=blocks,
            kv_heads=model.num_key_value_heads // self.part.size,
            block_size=self.config.block_size,
            head_dim=model.dim_per_head,
        )

    def free_bytes(self) -> int:
        """What this process may use for its cache, beside the weights and a step's activations."""
        if self.device.type == "cpu":
            return int(psutil.virtual_memory().available * CPU_SHARE) // self.part.size
        free, total = torch.cuda.mem_get_info(self.device)
        model, size = self.shape.config, self.part.size
        queries = model.num_attention_heads * model.dim_per_head // size
        widths = 4 * model.hidden_size + 6 * queries + 4 * model.intermediate_size // size
        activations = self.config.max_batch_tokens * widths * self.activations.itemsize
        logits = 3 * 4 * self.config.max_sequences * model.vocab_size
        return free - int(total * (1 - CUDA_SHARE)) - activations - logits

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, and the model around it."""
        self.cache = PagedCache(self.cache_shape(num_blocks), self.dtype, self.device)
        self.planner = Planner(self.cache.shape, self.activations, self.device, self.kernel_chunk)
        self.model = PagedModel(
            self.shape,
            self.weights,
            self.cache,
            self.activations,
            self.max_model_len,
            self.sharing,
            self.config.compile,
        )
        del self.weights  # packed by now
        if not self.sharing.is_shared:
            self.model.stack = LayerStack.of(self.model.layers, self.cache)
        self.graphs: DecodeGraphs | None = None
        if self.kernel == "Triton" and self.config.compile and self.part.size == 1:
            most_blocks = -(-self.max_model_len // self.config.block_size)
            self.graphs = DecodeGraphs(
                self.model, self.cache.shape, self.device, self.config.max_sequences, most_blocks
            )

    def run(self, batch: Batch) -> Tensor:
        """Logits [rows, vocab] float32: a row for each chunk that samples, in order."""
        if batch.copies:
            self.cache.copy(batch.copies)
        inputs = step_inputs(batch, self.planner)
        if self.graphs is not None and self.graphs.can_run(inputs):
            return self.graphs.run(inputs)
        return self.model(inputs)

    def _kernel(self) -> tuple[str, int]:
        """Who computes short chunks and decodes, and of how many tokens at most."""
        if self.device.type == "cuda":
            return ("Triton", 1) if has_gpu_kernel(self.device) else ("gathered blocks", 0)
        built, _ = native()
        if built is None or not built.library.attention_takes(self.shape.config.dim_per_head):
            return "gathered blocks", 0
        return "compiled C++", COMPILED_CHUNK


def step_inputs(batch: Batch, planner: Planner) -> StepInputs:
    """The tensors of `batch`, its chunks in the order in which attention wants them."""
    spans = [Span(chunk.start, chunk.length, chunk.block_table) for chunk in batch.chunks]
    places = planner.order(spans)
    spans = [spans[place] for place in places]
    numbers = [
        [token for place in places for token in batch.chunks[place].tokens],
        [position for span in spans for position in range(span.start, span.end)],
        _wanted(batch, places),
        planner.slots(spans),
    ]
    tokens, positions, wanted, slots = moved(numbers, np.int64, planner.device)
    return StepInputs(tokens, positions, wanted, planner.plan(spans, slots))


def _wanted(batch: Batch, places: list[int]) -> list[int]:
    """The last token of each chunk that samples, in the order of the batch."""
    ends = accumulate(batch.chunks[place].length for place in places)
    after = dict(zip(places, ends, strict=True))
    return [after[place] - 1 for place, chunk in enumerate(batch.chunks) if chunk.samples]


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
