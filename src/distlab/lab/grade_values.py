"""Data that both the grader and the student's process hold: its state, and its types by name."""

import collections
import dataclasses
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

NUMBERS = "biufcSU"  # NumPy's kinds of elements that are nothing but bits


class Shared:
    """A piece of data that both sides hold, and its state when they last agreed on it."""

    __slots__ = ("object", "state")

    def __init__(self, value: Any) -> None:
        self.object: Any = value
        self.state: Any = None


_lone = Shared([])
ONLY_HERE = sys.getrefcount(_lone.object)  # the count where only a Shared holds the object


def state_of(value: Any) -> Any:
    """What to compare by `same`: bytes, elements, or a set of them."""
    match value:
        case np.ndarray():
            return value.tobytes()
        case list():
            return list(value)
        case dict():
            return [*value, *value.values()]
        case set():
            return frozenset(value)
    if torch_type(value, "Tensor"):
        import torch

        flat = value.detach().cpu().contiguous()
        flat = flat.as_strided((flat.numel(),), (1,))  # of up to one element any stride may be told
        return flat.view(torch.uint8).numpy().tobytes()
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


def changed(entry: Shared) -> bool:
    now, before = state_of(entry.object), entry.state
    if isinstance(now, list):
        return len(now) != len(before) or not all(map(operator.is_, now, before))
    return bool(now != before)


def only_here(entry: Shared) -> bool:
    """Whether nobody here but `entry` holds the object, nor the array that it is a view of."""
    if sys.getrefcount(entry.object) > ONLY_HERE:
        return False
    view = isinstance(entry.object, np.ndarray) and entry.object.base is not None
    return not view or sys.getrefcount(entry.object.base) <= ONLY_HERE


def checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"no {kind.__name__}")
    return value


def type_code(dtype: np.dtype) -> str:
    if dtype.kind not in NUMBERS:
        raise TypeError(f"an array of {dtype} cannot leave its process; use numbers")
    return dtype.str


def numbers_type(code: str) -> np.dtype:
    """The dtype of such a code.

    Raises `ValueError` for one whose elements are objects, that is addresses in memory.
    """
    dtype = np.dtype(code)
    if dtype.kind not in NUMBERS:
        raise ValueError(f"dtype {code}")
    return dtype


def torch_type(value: Any, name: str) -> bool:
    """Whether it is an instance of torch's class `name`, without importing torch for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, name))


def torch_dtype(name: str) -> Any:
    import torch

    return checked(getattr(torch, name.removeprefix("torch.")), torch.dtype)


@functools.cache
def record_class(name: str, frozen: bool, names: tuple[str, ...]) -> type:
    return dataclasses.make_dataclass(name, names, frozen=frozen)


@functools.cache
def named_tuple(name: str, names: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    return collections.namedtuple(name, names)  # type: ignore[misc]
