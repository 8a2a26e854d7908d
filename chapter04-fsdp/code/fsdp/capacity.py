"""How many bytes a training step needs on one rank at its peak, and the largest model for a size.

A step is walked through in thought, moment by moment: the loss, the output matrix, each layer's
backward pass from the last to the first, the root, the optimizer. At each moment there are the
sharded state, the gradients reduced so far, the units that are whole, the gradients on their way,
and the activations that still wait. The peak is the largest of these sums. Float32 and AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from distlab.model import ModelConfig, num_parameters
from distlab.predict.activations import (
    Recompute,
    head_activations,
    layer_activations,
    loss_peak,
    peak_activations,
)

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Mode:
    """A way to spread the state: not at all (DDP), or fully sharded.

    `reshards`: units are freed between forward and backward; `recomputes`: so are activations.
    `on_disk`: weights and Adam's means lie in files that are mapped, outside the device's memory.
    """

    name: str
    sharded: bool = True
    reshards: bool = True
    recomputes: bool = False
    on_disk: bool = False


MODES = [
    Mode("DDP", sharded=False),
    Mode("DDP, recomputing", sharded=False, recomputes=True),
    Mode("kept after forward", reshards=False),
    Mode("fully sharded", reshards=True),
    Mode("fully sharded, recomputing", recomputes=True),
]


@dataclass(frozen=True)
class Moment:
    """A point of the step, and the bytes there."""

    name: str
    bytes: float


def peak(config: ModelConfig, mode: Mode, ranks: int, batch: int, seq_len: int) -> Moment:
    """The moment at which a rank of `ranks` holds most, with `batch` sequences of its own."""
    moments = sharded_moments if mode.sharded else replicated_moments
    return max(moments(config, mode, ranks, batch, seq_len), key=lambda moment: moment.bytes)


def replicated_moments(
    config: ModelConfig, mode: Mode, ranks: int, batch: int, seq_len: int
) -> list[Moment]:
    """DDP's: weights, buckets of gradients and Adam's means are there all the time."""
    state = 4 * FLOAT * num_parameters(config)
    again: Recompute = "full" if mode.recomputes else "none"
    moving = peak_activations(config.architecture, "fp32", seq_len, batch, again)
    return [Moment("backward", state + moving), Moment("optimizer", state)]


def sharded_moments(
    config: ModelConfig, mode: Mode, ranks: int, batch: int, seq_len: int
) -> list[Moment]:
    """A sharded rank's. The root is whole from forward on; a tied table's gradient waits in it."""
    a, tokens, layers = config.architecture, batch * seq_len, config.num_hidden_layers
    root, unit = unit_bytes(config)
    table = FLOAT * config.vocab_size * config.hidden_size
    shard, root_shard = unit / ranks, root / ranks
    state = 0.0 if mode.on_disk else 3 * (root_shard + layers * shard)  # weights, Adam's two means
    layer = tokens * layer_activations(a, 0, "fp32").total
    kept = tokens * FLOAT * config.hidden_size if mode.recomputes else layer
    gradients_within = tokens * FLOAT * (2 * config.intermediate_size + config.hidden_size)
    at_work = gradients_within + (layer if mode.recomputes else 0.0)

    def whole(left: int) -> float:
        """Units in memory while the backward pass of the last of `left` layers runs."""
        return (min(left, 2) if mode.reshards else left) * unit

    always = state + root
    head = tokens * head_activations(a, "fp32").total
    waiting = whole(layers) - (unit if mode.reshards else 0.0)
    found = [
        Moment("loss", always + waiting + layers * kept + tokens * loss_peak(a, "fp32").total),
        Moment("output", always + waiting + layers * kept + head + table),
    ]
    for left in range(layers, 0, -1):
        reduced = (layers - left) * shard
        on_its_way = 2 * unit if left < layers else 0.0  # the unit before: sent, and received
        rest = always + table + reduced + on_its_way + whole(left)
        found.append(Moment("a layer's backward", rest + left * kept + at_work))
        found.append(Moment("a layer's gradient", rest + (left - 1) * kept + 2 * unit))
    reduced = layers * shard
    tables = 3 * table if config.tie_word_embeddings else 2 * table
    found.append(Moment("the root's gradient", always + reduced + 2 * unit + tables))
    found.append(Moment("the root's reduction", always + reduced + 2 * root + table))
    found.append(Moment("optimizer", state + reduced + root_shard))
    return found


def unit_bytes(config: ModelConfig) -> tuple[int, int]:
    """Of the root's parameters, and of a layer's."""
    larger = replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    layer = num_parameters(larger) - num_parameters(config)
    return FLOAT * (num_parameters(config) - config.num_hidden_layers * layer), FLOAT * layer


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number of layers that fits, 0 if none does, looked for around `guess`.

    From there in steps that double, until the answer changes; then by halves.
    """
    low, high, step = 0, None, 1
    at = max(1, guess)
    while high is None or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        elif low == 0:
            at = max(1, high - step)
        else:
            at = (low + high) // 2
        step *= 2
        if high == 1:
            return 0
    return low
