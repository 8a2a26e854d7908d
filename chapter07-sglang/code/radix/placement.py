"""Which parts of a model go into the fast memory, when not all of them fit."""

from collections.abc import Mapping
from typing import NamedTuple


class Part(NamedTuple):
    """Attention of a layer (`expert` -1), or one of its experts."""

    layer: int
    expert: int


Placement = frozenset[Part]  # what is in the fast memory


def by_popularity(sizes: Mapping[Part, int], uses: Mapping[Part, int], budget: int) -> Placement:
    """The parts that are read most often, as many as `budget` bytes hold.

    A part in slow memory costs uses * bytes * (1 / slow - 1 / fast), and a byte of the budget saves
    what its part is used: so the order is that of the uses, whatever the sizes. It is the best one
    where the parts behind attention are of one size, but for what the last ones leave unfilled.
    """
    chosen = set[Part]()
    for part in sorted(sizes, key=lambda part: (-uses[part], part)):
        if sizes[part] <= budget:
            chosen.add(part)
            budget -= sizes[part]
    return frozenset(chosen)


def whole_layers(sizes: Mapping[Part, int], budget: int) -> Placement:
    """The first layers, all of each, as llama.cpp's --n-gpu-layers takes them."""
    chosen = set[Part]()
    for layer in sorted({part.layer for part in sizes}):
        own = [part for part in sizes if part.layer == layer]
        budget -= sum(sizes[part] for part in own)
        if budget < 0:
            break
        chosen.update(own)
    return frozenset(chosen)
