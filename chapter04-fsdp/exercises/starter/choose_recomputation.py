"""Task 6, choose-recomputation: which layers keep their activations, and which compute again."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """What a choice must know of a layer; the grader hands over objects like this."""

    whole: int  # bytes of the activations that its backward pass needs
    inputs: int  # bytes of these that are kept also where it computes again: 0 to `whole`
    microseconds: int  # that computing it again takes, 1 or more


def peak_bytes(layers: Sequence[Layer], again: Collection[int]) -> int:
    """The most bytes of activations at once, where the layers of these numbers compute again.

    `layers` stand in the order of the forward pass, numbered from 0. In forward a layer that
    computes again keeps its `inputs`, another one its `whole` activations. The backward pass goes
    from the last layer to the first. While it is in a layer, this one is there with its whole
    activations, whether they were kept or are computed again, and all layers before it with what
    they kept; those behind it are gone. That is never less than in forward. 0 without layers.
    """
    raise NotImplementedError("choose_recomputation.peak_bytes is yours to write")


def choose(layers: Sequence[Layer], budget: int) -> list[int]:
    """The numbers of the layers to compute again, in ascending order: the least time that fits.

    Of all choices whose peak is at most `budget` bytes the one that takes the fewest microseconds
    to compute again; of several the one with the lowest peak; of several of these the one that
    keeps the first layer in which they differ. This is exact: no choice is better. There are at
    most 12 layers, so that all choices may be tried.

    ValueError is raised where no choice fits. `layers` is not changed.
    """
    raise NotImplementedError("choose_recomputation.choose is yours to write")
