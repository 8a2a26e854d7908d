"""Forward passes with their FLOPs and bytes by the formulas, and how they stand under the roof."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from distlab import predict
from distlab.display import quantity
from distlab.measure import Timing
from distlab.model import KVCache, Llama
from distlab.predict import Architecture
from distlab.script import Run

WARM_UP = 3  # passes before a CUDA graph is recorded
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")
SQUARE = {"cpu": 512, "cuda": 8192}  # width of the product that the roof is made of


@dataclass
class Pass:
    """One forward pass: what it computes and moves, and once measured its times."""

    name: str
    size: int  # sequences of a decode step, tokens of a prefill
    products: float  # FLOPs of the weight matrices
    attention: float  # FLOPs of scores and weighted values, the masked half left out
    bytes_moved: float
    run: Callable[[], object]
    timing: Timing = Timing(())

    @property
    def seconds(self) -> float:
        """The median."""
        return self.timing.median

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


def show_roof(run: Run, machine: Machine, dtype: str) -> None:
    run.print()
    run.metric("peak_of_matrix_products", machine.peak, "FLOP/s", dtype)
    run.metric("bandwidth_of_reading", machine.bandwidth, "B/s")
    run.metric("ridge_point", machine.ridge, "FLOP per byte")


def show_passes(
    run: Run, machine: Machine, decode: Sequence[Pass], prefill: Sequence[Pass]
) -> None:
    for what, size, passes in (
        ("decode", "sequences", decode),
        ("prefill", "tokens", prefill),
    ):
        run.print()
        rows = []
        for one in passes:
            bound = machine.bound(one)
            rows.append([
                one.size, one.intensity, one.intensity / machine.ridge, 1e3 * bound,
                1e3 * one.seconds, 100 * bound / one.seconds, one.rate,
            ])  # fmt: skip
        columns = ["FLOPs/byte", "÷ ridge", "bound, ms", "measured, ms", "% of roof", "tok/s"]
        run.table(
            what,
            [size, *columns],
            rows,
            caption=f"A {what} pass. Limited by memory where ÷ ridge is below 1; "
            "bound = max(FLOPs / peak, bytes / bandwidth)",
        )
    for one in (decode[0], decode[-1], prefill[-1]):
        run.compare(f"time of a {one.name}", machine.bound(one), one.seconds, "s")


def show_turn(run: Run, machine: Machine, a: Architecture, decode: Sequence[Pass]) -> None:
    """Where decode turns from memory to compute: by the formula, and where two measured lines meet.

    The lines are the flat one through the smallest batch's step time, and the one from zero through
    the largest batch's: they meet at the ratio of the two rates.
    """
    run.print()
    batch, context = turning_batch(machine, decode), turning_context(machine, a, decode)
    run.metric("batch_where_decode_turns", batch, note="by the formula; unknown: no batch does")
    run.metric(
        "context_from_which_no_batch_turns", context, note="tokens; unknown: batching always helps"
    )
    measured = decode[-1].rate / decode[0].rate * decode[0].size
    run.compare(
        "turning batch, as far as it was swept", min(batch or inf, decode[-1].size), measured
    )
    where = "never" if batch is None else f"at a batch of {batch:.3g}"
    run.print(
        f"verdict: decode turns from memory to compute {where} by the formula; measured, a batch "
        f"of {decode[-1].size} makes {decode[-1].rate / decode[0].rate:.3g} times the tokens of "
        f"{decode[0].size}, {quantity(decode[-1].rate, 'tok/s')}"
    )


def turning_batch(machine: Machine, decode: Sequence[Pass]) -> float | None:
    """B* = (W / M) / (f / P - C / M); None where the cache alone takes longer than the arithmetic.

    Both are straight lines in the batch, so two steps give W, C and f.
    """
    first, last = decode[0], decode[-1]
    own_bytes = (last.bytes_moved - first.bytes_moved) / (last.size - first.size)
    weights = first.bytes_moved - first.size * own_bytes
    saved = first.flops / first.size / machine.peak - own_bytes / machine.bandwidth
    return weights / machine.bandwidth / saved if saved > 0 else None


def turning_context(machine: Machine, a: Architecture, decode: Sequence[Pass]) -> float | None:
    """Tokens of context at which a sequence's cache takes as long to read as its arithmetic.

    2·N / P over the time that one more token costs, C / M less its attention's FLOPs / P; None
    where attention is limited by compute as well.
    """
    first, last = decode[0], decode[-1]
    own_bytes = (last.bytes_moved - first.bytes_moved) / (last.size - first.size)
    attention = predict.forward_flops_per_token(a, 1) - 2 * predict.matmul_parameters(a)
    seen = first.attention / first.size / attention  # tokens
    cost = own_bytes / (seen + 1) / machine.bandwidth - attention / machine.peak
    return 2 * predict.matmul_parameters(a) / machine.peak / cost if cost > 0 else None


def draw(run: Run, machine: Machine, decode: Sequence[Pass], prefill: Sequence[Pass]) -> None:
    intensities = [one.intensity for one in [*decode, *prefill]]
    x = np.geomspace(min(intensities) / 2, 2 * max(*intensities, machine.ridge), 64)
    points = [
        {"label": label, "points": True, "x": [p.intensity for p in passes],
         "y": [p.flops / p.seconds for p in passes]}
        for label, passes in (
            (f"decode, batch {decode[0].size} to {decode[-1].size}", decode),
            (f"prefill, {prefill[0].size} to {prefill[-1].size} tokens", prefill),
        )
    ]  # fmt: skip
    run.figure(
        "inference_roofline", kind="line", log_x=True, log_y=True,
        title="Decode climbs the slope with its batch; prefill is under the flat roof",
        x_label="arithmetic intensity (FLOPs per byte)", y_label="speed (FLOP/s)",
        series=[{"label": "roof", "x": x.tolist(), "y": [machine.height(i) for i in x]}, *points],
        lines=[{"label": "ridge", "x": machine.ridge}],
    )  # fmt: skip
    turn = turning_batch(machine, decode)
    sizes = [one.size for one in decode]
    run.figure(
        "inference_batching", kind="line", log_x=True, log_y=True,
        title="Batching is free until decode turns from memory to compute",
        x_label="sequences in the batch", y_label="tokens per second",
        series=[
            {"label": "measured", "x": sizes, "y": [one.rate for one in decode]},
            {"label": "bound", "dashed": True, "x": sizes,
             "y": [one.size / machine.bound(one) for one in decode]},
        ],
        lines=[] if turn is None else [{"label": "turn", "x": turn}],
    )  # fmt: skip
