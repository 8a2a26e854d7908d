"""One process's part of the model with its part of the cache: what executes a step."""

import json
from dataclasses import asdict, dataclass

import psutil
import torch
from torch import Tensor

from paged_engine._attention_plan import COMPILED_CHUNK, Planner
from paged_engine._kernels_build import native
from paged_engine._loading_weights import Part, load_weights
from paged_engine._runner_graphs import DecodeGraphs
from paged_engine._runner_inputs import Step, step_inputs
from paged_engine.attention import CacheShape, PagedCache, has_gpu_kernel
from paged_engine.loading import DTYPES, Shape, read_shape
from paged_engine.paged_model import PagedModel, Sharing

CPU_SHARE = 0.25  # of the available memory: the cache of a machine that does other things too
CUDA_SHARE = 0.9  # of the device's memory: weights, activations and cache together


@dataclass(frozen=True)
class Settings:
    """What a process needs to build its shard; plain values, so that they travel as JSON."""

    directory: str
    dtype: str
    device: str  # cpu or cuda; process r of several takes cuda:r
    block_size: int
    max_model_len: int
    max_sequences: int
    compile: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        return cls(**json.loads(text))


class Shard:
    """Weights first, so that what they leave of the memory is known; then the cache."""

    def __init__(
        self,
        settings: Settings,
        part: Part,
        sharing: Sharing | None = None,
    ) -> None:
        self.settings, self.part = settings, part
        self.sharing = sharing or Sharing()
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", part.rank)
            torch.cuda.set_device(self.device)
        self.shape: Shape = read_shape(settings.directory)
        self.dtype = DTYPES[settings.dtype]
        # A CPU computes in float32 whatever the weights and the cache are kept in: less memory is
        # read, and nothing is lost where the processor has no instructions for narrow types.
        self.activations = torch.float32 if self.device.type == "cpu" else self.dtype
        self.weights = load_weights(
            settings.directory, self.shape, self.dtype, self.device, self.part
        )
        self.kernel, self.kernel_chunk = self._kernel()

    def cache_shape(self, blocks: int) -> CacheShape:
        """The part of a cache of `blocks` blocks that this process holds."""
        config = self.shape.config
        return CacheShape(
            layers=config.num_hidden_layers,
            blocks=blocks,
            kv_heads=config.num_key_value_heads // self.part.size,
            block_size=self.settings.block_size,
            head_dim=config.dim_per_head,
        )

    def free_bytes(self, max_batch_tokens: int) -> int:
        """What this process may use for its cache, beside the weights and a step's activations."""
        if self.device.type == "cpu":
            return int(psutil.virtual_memory().available * CPU_SHARE) // self.part.size
        free, total = torch.cuda.mem_get_info(self.device)
        config, size = self.shape.config, self.part.size
        queries = config.num_attention_heads * config.dim_per_head // size
        widths = 4 * config.hidden_size + 6 * queries + 4 * config.intermediate_size // size
        activations = max_batch_tokens * widths * self.activations.itemsize
        logits = 3 * 4 * self.settings.max_sequences * config.vocab_size
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
            self.settings.max_model_len,
            self.sharing,
            self.settings.compile,
        )
        del self.weights  # packed by now
        self.graphs: DecodeGraphs | None = None
        if self.kernel == "Triton" and self.settings.compile and self.part.size == 1:
            most_blocks = -(-self.settings.max_model_len // self.settings.block_size)
            self.graphs = DecodeGraphs(
                self.model, self.cache.shape, self.device, self.settings.max_sequences, most_blocks
            )

    def run(self, step: Step) -> Tensor:
        """Logits [rows, vocab] float32: a row for each span that samples, in order."""
        if step.copies:
            self.cache.copy(step.copies)
        inputs = step_inputs(step, self.planner)
        if self.graphs is not None and self.graphs.can_run(inputs):
            return self.graphs.run(inputs)
        return self.model(inputs)

    def _kernel(self) -> tuple[str, int]:
        """Who computes short chunks and decodes, and of how many tokens at most."""
        if self.device.type == "cuda":
            return ("Triton", 1) if has_gpu_kernel(self.device) else ("gathered blocks", 0)
        config, (built, _) = self.shape.config, native()
        if built is None or not built.library.attention_takes(config.dim_per_head):
            return "gathered blocks", 0
        return "compiled C++", COMPILED_CHUNK
