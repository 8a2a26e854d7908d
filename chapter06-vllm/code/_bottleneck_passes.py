"""The passes that inference_bottlenecks.py measures, with their FLOPs and bytes by the formulas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from distlab import predict
from distlab.model import KVCache, Llama

WARM_UP = 3  # passes before a CUDA graph is recorded
SQUARE = {"cpu": 512, "cuda": 8192}  # width of the product that the roof is made of


@dataclass
class Pass:
    """One forward pass: what it computes and moves, and once measured its median seconds."""

    name: str
    size: int  # sequences of a decode step, tokens of a prefill
    products: float  # FLOPs of the weight matrices
    attention: float  # FLOPs of scores and weighted values, the masked half left out
    bytes_moved: float
    run: Callable[[], object]
    seconds: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.attention

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_moved

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.size / self.seconds


@dataclass(frozen=True)
class Machine:
    """FLOP/s and bytes/s, the best that was measured."""

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on compute is the limit."""
        return self.peak / self.bandwidth

    def height(self, intensity: float) -> float:
        return min(self.peak, intensity * self.bandwidth)

    def bound(self, one: Pass) -> float:
        """Seconds that the pass takes at least."""
        return predict.roofline_seconds(one.flops, one.bytes_moved, self.peak, self.bandwidth)


class Rig:
    """Makes the passes of one model; a decode step follows `context` - 1 tokens and sees itself."""

    def __init__(self, model: Llama, context: int) -> None:
        self.model, self.context = model, context
        self.a = model.config.architecture
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache_bytes_per_token = (
            2 * self.a.num_hidden_layers * self.a.key_value_size * self.dtype.itemsize
        )

    def cache(self, batch: int, room: int = 16) -> KVCache:
        return KVCache(self.model.config, batch, room, self.device, self.dtype)

    def decode(self, batch: int) -> Pass:
        """One more token for each of `batch` sequences."""
        return self._pass(f"decode of {batch}", batch, 1, self.context - 1)

    def prefill(self, length: int) -> Pass:
        """A prompt of `length` tokens, of which only the last needs an output."""
        return self._pass(f"prefill of {length}", 1, length, 0)

    def _pass(self, name: str, batch: int, new: int, past: int) -> Pass:
        """`new` tokens for each of `batch` sequences that have `past` tokens in the cache."""
        tokens = torch.ones(batch, new, dtype=torch.long, device=self.device)
        cache = self.cache(batch, past + new)

        def run() -> object:
            cache.length = past
            return self.model.next_logits(tokens, cache)

        head = 2 * self.a.vocab_size * self.a.hidden_size
        per_token = 2 * predict.matmul_parameters(self.a) - head
        seen = past + (new + 1) / 2  # on the mean, itself included
        attention = predict.forward_flops_per_token(self.a, seen) - per_token - head
        weights = predict.matmul_parameters(self.a) * self.dtype.itemsize
        moved = weights + batch * (past + 2 * new) * self.cache_bytes_per_token  # written, and read
        products = batch * (new * per_token + head)
        return Pass(name, batch * new, products, batch * new * attention, moved, run)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph: one launch for all its kernels, which a small pass would wait for."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Stream(NamedTuple):
    """What a roof is made of; `amount` is its FLOPs or bytes."""

    amount: float
    run: Callable[[], object]


def roofs(device: torch.device, dtype: torch.dtype, memory: int) -> dict[str, Stream]:
    """A square product, and two ways to read `memory` bytes: their sum, and products with one row.

    Decode reads and hardly writes, so its roof is reading; a copy has to write as much.
    """
    width = SQUARE[device.type]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    numbers = torch.ones(memory // 4, dtype=torch.float32, device=device)
    count = max(1, memory // (b.numel() * b.element_size()))
    matrices = [torch.ones_like(b) for _ in range(count)]

    def one_row() -> None:
        for matrix in matrices:
            torch.mv(matrix, a[0])

    return {
        "square": Stream(2.0 * width**3, lambda: a @ b),
        "sum": Stream(numbers.numel() * 4, numbers.sum),
        "one row": Stream(count * b.numel() * b.element_size(), one_row),
    }


def flops_of(run: Callable[[], object]) -> int:
    """The FLOPs of a pass's products of matrices, as torch counts them; attention's are not."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if str(operator) in PRODUCTS)


PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")
