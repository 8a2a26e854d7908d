"""A two-layer network that guesses the next character, with its gradient written by hand (NumPy).

Everything has an axis for the workers: K workers with b examples each are one array [K, b, …], and
what each worker finds by itself is [K, …]. One machine is K = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from distlab.data.corpus import read_corpus
from distlab.errors import UsageError

CONTEXT, HIDDEN = 4, 48  # characters that the network sees, and its hidden units
SHORTEST_TEXT = 1000  # characters
OWN, EVERYBODY = (1,), (0, 1)  # the axes over which batch norm takes its statistics

Arrays = dict[str, np.ndarray]  # parameters, or their gradients, by name


class Examples(NamedTuple):
    """What the workers see, x [K, b, CONTEXT * vocabulary] one-hot, and must guess, y [K, b]."""

    x: np.ndarray
    y: np.ndarray

    def shared_by(self, workers: int) -> "Examples":
        """The same examples in equal shards: [1, B, …] to [K, B / K, …]."""
        return Examples(self.x.reshape(workers, -1, self.x.shape[-1]), self.y.reshape(workers, -1))

    def cut(self, counts: list[int]) -> list["Examples"]:
        """The same examples in shards of `counts` examples: [1, B, …] to a list of [1, b, …]."""
        cuts = np.cumsum(counts)[:-1]
        parts = zip(np.split(self.x, cuts, axis=1), np.split(self.y, cuts, axis=1), strict=True)
        return [Examples(*part) for part in parts]


class Text:
    """Real text as integers, one per character, and random examples from it."""

    def __init__(self, corpus: str, seed: int) -> None:
        text = "\n".join(read_corpus(corpus, max_bytes=200_000)).encode()
        if len(text) < SHORTEST_TEXT:
            raise UsageError(
                f"--corpus {corpus} has {len(text)} characters; use one of {SHORTEST_TEXT} or more"
            )
        known, self.codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
        self.vocabulary = len(known)
        self.random = np.random.default_rng(seed)

    def examples(self, count: int) -> Examples:
        """`count` random examples on one machine, [1, count, …]."""
        starts = self.random.integers(len(self.codes) - CONTEXT, size=(count, 1))
        windows = self.codes[starts + np.arange(CONTEXT + 1)]
        one_hot = np.eye(self.vocabulary)[windows[:, :CONTEXT]]
        return Examples(one_hot.reshape(1, count, -1), windows[None, :, CONTEXT])

    def new_parameters(self) -> Arrays:
        return {
            "w1": self.random.normal(0, 0.1, (CONTEXT * self.vocabulary, HIDDEN)),
            "b1": np.zeros(HIDDEN),
            "w2": self.random.normal(0, 0.1, (HIDDEN, self.vocabulary)),
            "b2": np.zeros(self.vocabulary),
        }


def loss_and_gradients(
    parameters: Arrays, examples: Examples, batch_norm: tuple[int, ...] | None = None
) -> tuple[np.ndarray, Arrays]:
    """Each worker's mean cross-entropy in nats, [K], and its gradient by name, [K, …]."""
    w1, b1, w2, b2 = parameters.values()
    x, y = examples
    sums = x @ w1  # [K, b, HIDDEN]
    normal, through_norm = normalise(sums, batch_norm) if batch_norm else (sums, lambda d: d)
    hidden = np.tanh(normal + b1)
    logits = hidden @ w2 + b2  # [K, b, vocabulary]
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    target = np.eye(len(b2))[y]
    losses = -np.log((probabilities * target).sum(axis=-1)).mean(axis=1)

    d_logits = (probabilities - target) / y.shape[1]
    d_normal = d_logits @ w2.T * (1 - hidden**2)
    return losses, {
        "w1": x.mT @ through_norm(d_normal),
        "b1": d_normal.sum(axis=1),
        "w2": hidden.mT @ d_logits,
        "b2": d_logits.sum(axis=1),
    }


def normalise(
    sums: np.ndarray, axes: tuple[int, ...]
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Batch norm over `axes`, and the function that takes a gradient back through it.

    Over EVERYBODY, each of the four means is an all-reduce (Ioffe and Szegedy 2015, section 3).
    """
    scale = 1 / np.sqrt(sums.var(axes, keepdims=True) + 1e-5)
    normal = (sums - sums.mean(axes, keepdims=True)) * scale

    def backward(d: np.ndarray) -> np.ndarray:
        along = (d * normal).mean(axes, keepdims=True)
        return scale * (d - d.mean(axes, keepdims=True) - normal * along)

    return normal, backward
