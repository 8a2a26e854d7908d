"""What the agent hears of a rank's data: the sampler's orders, and the loader's batches."""

import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import diagnose_frames as frames
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

if TYPE_CHECKING:
    from diagnose_agent import Agent


def samplers(agent: "Agent") -> None:
    """The order that a DistributedSampler gives each time that it is asked, and its epoch."""
    order = DistributedSampler.__iter__
    numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    fresh = itertools.count()

    @functools.wraps(order)
    def watched(sampler: Any) -> Iterator[Any]:
        number = numbers.get(sampler)
        if number is None:
            number = numbers[sampler] = next(fresh)
        indices = list(order(sampler))
        agent.tell(
            "epoch", sampler=number, epoch=sampler.epoch, shuffle=sampler.shuffle,
            order=hash(tuple(indices[:10_000])), place=frames.caller(),
            steps=agent.counts["steps"],
        )  # fmt: skip
        return iter(indices)

    DistributedSampler.__iter__ = watched  # type: ignore[method-assign]


def loaders(agent: "Agent") -> None:
    """How many batches each pass over a DataLoader has given, and where it came to its end."""
    begin: Any = DataLoader.__iter__
    draw: Any = _BaseDataLoaderIter.__next__
    numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    fresh = itertools.count()

    @functools.wraps(begin)
    def watched_begin(loader: Any) -> Any:
        iterator = begin(loader)
        number = numbers.get(loader)
        if number is None:
            number = numbers[loader] = next(fresh)
        iterator._diagnose = [number, 0]
        return iterator

    @functools.wraps(draw)
    def watched_draw(iterator: Any) -> Any:
        try:
            batch = draw(iterator)
        except StopIteration:
            number, drawn = getattr(iterator, "_diagnose", (None, 0))
            agent.tell("exhausted", loader=number, drawn=drawn, place=frames.caller())
            raise
        if hasattr(iterator, "_diagnose"):
            iterator._diagnose[1] += 1
            agent.counts[f"loader{iterator._diagnose[0]}"] = iterator._diagnose[1]
        return batch

    DataLoader.__iter__ = watched_begin  # type: ignore[method-assign]
    _BaseDataLoaderIter.__next__ = watched_draw  # type: ignore[method-assign, assignment]
