"""Part of a model in slow memory: what a step costs then, and which part it should be.

A decode step of one sequence reads each weight that it uses once, so its time is that of reading,
each part from the pool in which it lies, and of moving the activations where a part lies elsewhere:

    step = sum over parts used of bytes / bandwidth(pool of the part) + crossings * transfer

A dense layer is used in each step; of a layer's experts only some are, and some more often than
others. So under a budget of fast memory a byte is worth how often it is read: attention first,
then the experts in the order of their popularity (KTransformers leaves attention on the GPU; its
experts are on the CPU, or spread evenly, or by frequency). Bandwidths and the transfer are
measured, then steps of other tokens are predicted, and measured.

On a GPU the pools are its memory and the host's. On a CPU both are the host's, and one has a
planted limit of bandwidth (--slowdown).

Run:
    python chapter07-sglang/code/hybrid_placement.py --figures build/figures
    python chapter07-sglang/code/hybrid_placement.py --budget 0.5 --skew 0

You should see: a dense step growing by the same amount with each layer that is moved, as predicted;
with experts, popularity the best of the placements for skewed routing, far ahead of whole layers;
with --skew 0 little left to choose but that attention stays.

Source: Chen et al., "KTransformers" (SOSP 2025); Sheng et al., "FlexGen" (ICML 2023).
"""

import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distlab import script
from distlab.display import side_by_side
from distlab.errors import UsageError
from distlab.hardware import chosen_device
from distlab.measure import measure
from distlab.run import Run
from radix.placement import Part, Placement, by_popularity, whole_layers

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"layers": 3, "hidden": 128, "experts": 4, "steps": 12, "repeats": 3},
    "laptop": {"layers": 6, "hidden": 512, "experts": 16, "steps": 24, "repeats": 5},
    "gpu": {"layers": 16, "hidden": 2048, "experts": 32, "steps": 200, "repeats": 5},
}  # fmt: skip
TOP_K = 2  # experts that a token uses in a layer
ATTENTION, EXPERT = 4, 3  # rows of their weights, in hidden sizes
SEEDS = (0, 1)  # of the routing that is known, and of that which is measured


@dataclass
class Pool:
    """A place for weights; with `bytes_per_s` no product reads its weight faster than that."""

    name: str
    device: torch.device
    bytes_per_s: float | None = None
    call_s: float = 0.0  # of a product without its bytes, once measured
    byte_s: float = 0.0

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        started = time.perf_counter()
        y = F.linear(x, weight)
        if self.bytes_per_s is not None:
            until = started + weight.nbytes / self.bytes_per_s
            while time.perf_counter() < until:  # a sleep would be too long by a twentieth of a ms
                pass
        return y

    def seconds(self, size: int) -> float:
        return self.call_s + size * self.byte_s


class Model:
    """Layers of attention and experts, each one matrix; `pools` are the fast one and the slow."""

    def __init__(self, args: Namespace, experts: int, pools: tuple[Pool, Pool]) -> None:
        torch.manual_seed(0)
        self.hidden, self.pools = args.hidden, pools
        self.weights: dict[Part, Tensor] = {}
        for layer in range(args.layers):
            for place in range(-1, experts):  # -1 is attention
                rows = (ATTENTION if place < 0 else EXPERT) * args.hidden
                self.weights[Part(layer, place)] = torch.randn(rows, args.hidden) / args.hidden**0.5
        self.bytes = {part: weight.nbytes for part, weight in self.weights.items()}
        self.fast: Placement = frozenset()

    def place(self, fast: Placement) -> None:
        """Put these parts into the fast pool, and the others into the slow one."""
        self.fast = fast
        for part, weight in self.weights.items():
            self.weights[part] = weight.to(self.pools[part not in fast].device)

    def step(self, used: list[list[int]]) -> Tensor:
        """One token: in each layer attention, then its experts. Where the stream is, is fast."""
        fast, _ = self.pools
        x = torch.ones(self.hidden, device=fast.device)
        for layer, experts in enumerate(used):
            for group in ([Part(layer, -1)], [Part(layer, one) for one in experts]):
                x = F.normalize(x + self._sum(x, group), dim=0)
        return x.cpu()

    def _sum(self, x: Tensor, parts: list[Part]) -> Tensor:
        """What these parts add; those in the slow pool get the activations once, together."""
        total = torch.zeros_like(x)
        for pool, own in zip(self.pools, self._split(parts), strict=True):
            if own:
                there = x.to(pool.device, copy=pool is self.pools[1])
                made = [pool.product(there, self.weights[part])[: self.hidden] for part in own]
                total += torch.stack(made).sum(0).to(x.device)
        return total

    def _split(self, parts: list[Part]) -> tuple[list[Part], list[Part]]:
        fast = [part for part in parts if part in self.fast]
        return fast, [part for part in parts if part not in self.fast]

    def predicted(self, trace: list[list[list[int]]], transfer_s: float, rest_s: float) -> float:
        """Seconds of a step, in the mean over those of the trace."""
        fast, slow = self.pools
        total = 0.0
        for used in trace:
            for layer, experts in enumerate(used):
                for group in ([Part(layer, -1)], [Part(layer, one) for one in experts]):
                    own = self._split(group)
                    total += rest_s + bool(own[1]) * transfer_s
                    total += sum(fast.seconds(self.bytes[part]) for part in own[0])
                    total += sum(slow.seconds(self.bytes[part]) for part in own[1])
        return total / len(trace)

    def measured(self, trace: list[list[list[int]]]) -> tuple[float, Tensor]:
        """The same by the clock, and the last step's output."""
        out = self.step(trace[0])
        started = time.perf_counter()
        for used in trace:
            out = self.step(used)
        return (time.perf_counter() - started) / len(trace), out


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, torch.inference_mode():
        pools = make_pools(run, args)
        parts = calibrate(args, pools)
        move_layers(run, args, pools, parts)
        place_experts(run, args, pools, parts)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    positive: dict[str, Any] = {"type": script.positive_int}
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--layers", **positive)
    parser.add_argument("--hidden", **positive)
    parser.add_argument("--experts", **positive, help=f"of a layer; a token uses {TOP_K}")
    parser.add_argument("--steps", **positive, help="tokens that are timed")
    parser.add_argument("--repeats", **positive, help="of all placements, in turns")
    parser.add_argument("--budget", type=script.fraction, default=0.4, help="of all bytes: what "
                        "the fast pool holds")  # fmt: skip
    parser.add_argument("--skew", type=script.non_negative_float, default=1.2, help="of the "
                        "routing: the r-th expert is used like 1 / r^skew")  # fmt: skip
    parser.add_argument("--slowdown", type=script.positive_float, default=5.0, help="of the slow "
                        "pool, on a CPU")  # fmt: skip
    args = parser.parse_args(argv)
    script.refuse_no_median(args, "repeats")
    if args.experts <= TOP_K:
        raise UsageError(f"--experts {args.experts}: a token uses {TOP_K}; use more than that")
    if args.slowdown < 1:
        raise UsageError(f"--slowdown {args.slowdown:g} makes the slow pool fast; use 1 or more")
    return args


def make_pools(run: Run, args: Namespace) -> tuple[Pool, Pool]:
    """The GPU's and the host's memory; or the host's twice, the second time with a limit."""
    device = torch.device(chosen_device(args.device))
    fast, slow = Pool("fast", device), Pool("slow", torch.device("cpu"))
    learn(fast, args)
    if device.type == "cpu":
        slow.bytes_per_s = 1 / (args.slowdown * fast.byte_s)
    learn(slow, args)
    for pool in (fast, slow):
        run.metric(f"{pool.name}_pool", 1 / pool.byte_s, "B/s")
    return fast, slow


def learn(pool: Pool, args: Namespace) -> None:
    """Fit call and byte seconds to products of two sizes, over weights that no cache keeps."""
    times, sizes = [], []
    for rows in (ATTENTION * args.hidden, 4 * ATTENTION * args.hidden):
        count = max(2, (64 << 20) // (rows * args.hidden * 4)) if args.preset != "smoke" else 4
        weights = [torch.randn(rows, args.hidden, device=pool.device) for _ in range(count)]
        x = torch.ones(args.hidden, device=pool.device)

        def all_of_them(x: Tensor = x, weights: list[Tensor] = weights) -> Tensor:
            return torch.stack([pool.product(x, weight)[0] for weight in weights]).cpu()

        times.append(measure(all_of_them, 1, 2 * args.repeats).median / count)
        sizes.append(weights[0].nbytes)
    pool.byte_s = max(times[1] - times[0], 1e-7) / (sizes[1] - sizes[0])
    pool.call_s = max(0.0, times[0] - sizes[0] * pool.byte_s)


def calibrate(args: Namespace, pools: tuple[Pool, Pool]) -> tuple[float, float]:
    """Seconds of a transfer there and back, and of all else that a group of parts needs."""
    model = Model(args, 1, pools)
    everything = frozenset(model.weights)
    trace = [[[0]] * args.layers] * args.steps
    groups = 2 * args.layers
    rest, crossing = list[float](), list[float]()
    for _ in range(args.repeats):
        for fast, into in ((everything, rest), (frozenset[Part](), crossing)):
            model.place(fast)
            took, _ = model.measured(trace)
            into.append((took - model.predicted(trace, 0.0, 0.0)) / groups)
    own = max(0.0, float(np.median(rest)))
    return max(0.0, float(np.median(crossing)) - own), own


def move_layers(
    run: Run, args: Namespace, pools: tuple[Pool, Pool], parts: tuple[float, float]
) -> None:
    """A dense model: one whole layer more in the slow pool each time."""
    model = Model(args, 1, pools)
    trace = [[[0]] * args.layers] * args.steps
    rows = []
    outputs = []
    for slow in range(args.layers + 1):
        model.place(frozenset(part for part in model.weights if part.layer >= slow))
        made = [model.measured(trace) for _ in range(args.repeats)]
        outputs.append(made[0][1])
        took = float(np.median([seconds for seconds, _ in made]))
        rows.append([slow, *side_by_side(model.predicted(trace, *parts), took, 1e3)])
    run.table(
        "layers", ["layers in the slow pool", "predicted step, ms", "measured, ms", "error, %"],
        rows, caption=f"a dense model of {args.layers} layers",
    )  # fmt: skip
    run.figure(
        "hybrid_layers", kind="line", title="Layers in slow memory",
        x_label="layers in the slow pool", y_label="ms a step",
        series=[{"label": "measured", "x": [r[0] for r in rows], "y": [r[2] for r in rows]},
                {"label": "predicted", "x": [r[0] for r in rows], "y": [r[1] for r in rows],
                 "dashed": True}],
    )  # fmt: skip
    same = outputs[:1] * len(outputs)
    run.check_close("the placement changes no output", outputs, same, 1e-4)


def draw_trace(args: Namespace, seed: int) -> list[list[list[int]]]:
    """The experts of each step and layer; which of them are popular differs from layer to layer."""
    order = np.random.default_rng(7)  # the same popularity for every seed
    popular = [order.permutation(args.experts) for _ in range(args.layers)]
    weights = 1 / np.arange(1, args.experts + 1) ** args.skew
    draw = np.random.default_rng(seed)
    return [
        [ranks[draw.choice(args.experts, TOP_K, replace=False, p=weights / weights.sum())].tolist()
         for ranks in popular]
        for _ in range(args.steps)
    ]  # fmt: skip


def place_experts(
    run: Run, args: Namespace, pools: tuple[Pool, Pool], parts: tuple[float, float]
) -> None:
    """Placements under one budget, planned with one trace and measured with another."""
    model = Model(args, args.experts, pools)
    known, new = (draw_trace(args, seed) for seed in SEEDS)
    budget = int(args.budget * sum(model.bytes.values()))
    uses = dict.fromkeys(model.weights, 0)
    for used in known:
        for layer, experts in enumerate(used):
            for place in (-1, *experts):
                uses[Part(layer, place)] += 1
    attention = {part for part in model.weights if part.expert < 0}
    at_random = {part: int(part in attention) for part in model.weights}
    placements = {
        "whole layers": whole_layers(model.bytes, budget),
        "attention, then any experts": by_popularity(model.bytes, at_random, budget),
        "by popularity": by_popularity(model.bytes, uses, budget),
    }
    planned, predicted = dict[str, float](), dict[str, float]()  # of the two traces
    took: dict[str, list[float]] = {name: [] for name in placements}
    outputs = []
    for _ in range(args.repeats):
        for name, placement in placements.items():
            model.place(placement)
            planned[name] = model.predicted(known, *parts)
            predicted[name] = model.predicted(new, *parts)
            seconds, out = model.measured(new)
            took[name].append(seconds)
            outputs.append(out)
    rows = [
        [name, sum(model.bytes[part] for part in placement) / 1e6,
         *side_by_side(predicted[name], float(np.median(took[name])), 1e3)]
        for name, placement in placements.items()
    ]  # fmt: skip
    run.table(
        "experts", ["in the fast pool", "MB there", "predicted step, ms", "measured, ms",
                    "error, %"], rows,
        caption=f"{args.layers} layers of {args.experts} experts, {args.budget:.0%} of "
                f"{sum(model.bytes.values()) / 1e6:.0f} MB in the fast pool",
    )  # fmt: skip
    chosen = min(planned, key=planned.__getitem__)
    run.print(f"chosen: {chosen}")
    same = outputs[:1] * len(outputs)
    run.check_close("the placement changes no output", outputs, same, 1e-4)
    most = max(sum(model.bytes[part] for part in own) for own in placements.values())
    run.check_below("every placement keeps to the budget", most, budget, "bytes")
    ratios = [a / b for a, b in zip(took[chosen], took["whole layers"], strict=True)]
    run.check_within("the chosen one's step to that of whole layers", ratios, 1.0)


if __name__ == "__main__":
    script.exit(main)
