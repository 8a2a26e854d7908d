"""Objects of the other process: what each side keeps for the other, and handles on it."""

import collections
import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

SHOWN = ("__file__", "__name__", "__doc__")  # the only names of this form that a handle asks for


class BrokenWire(Exception):
    """The other process has ended, or what came from it is no message."""


class Side:
    """What one process tells the other of: the objects that it keeps, by number."""

    key_parity = 0  # the keys of what this side shares first are even or odd

    def __init__(self) -> None:
        self.exports: dict[int, list[Any]] = {}  # number: [object, how often it was sent]
        self.numbers: dict[int, int] = {}  # id of the object: its number
        self.counter = itertools.count(1)
        self.handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        self.dropped: collections.deque[tuple[int, int]] = collections.deque()

    def perform(self, action: str, *args: Any) -> Any:
        """Do what the other side asks for."""
        raise NotImplementedError

    def wire(self, handle: "Handle") -> Any:
        """The connection of this thread."""
        raise NotImplementedError

    def export(self, value: Any) -> list[Any]:
        """The node of an object that stays here."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = next(self.counter)
            self.exports[number] = [value, 0]
        self.exports[number][1] += 1
        return ["handle", number, type(value).__name__, method_names(value)]

    def forget(self, number: int, times: int) -> None:
        """The other side has dropped a handle that it had got `times` times."""
        entry = self.exports[number]
        entry[1] -= times
        if entry[1] <= 0:
            del self.exports[number], self.numbers[id(entry[0])]

    def place(self, error: BaseException) -> str:
        """Where the student's code raised it, as file:line."""
        return ""

    def check_alive(self) -> None:
        """Raise `BrokenWire` where nothing can come any more."""

    def ended(self) -> NoReturn:
        """Raise `BrokenWire`: the other side has closed the connection."""
        self.broken("the other process has ended")

    def broken(self, why: str) -> NoReturn:
        """Raise `BrokenWire`: nothing more can be said."""
        raise BrokenWire(why)


def method_names(value: Any) -> list[str]:
    """What can be called on it: these names cost no question of their own."""
    if isinstance(value, types.ModuleType):
        return [name for name, member in vars(value).items() if callable(member)]
    kind: Any = type(value)
    return methods_of_class(kind)


@functools.cache
def methods_of_class(kind: type) -> list[str]:
    called = (types.FunctionType, classmethod, staticmethod)
    members = {name: member for c in reversed(kind.__mro__) for name, member in vars(c).items()}
    return [n for n, m in members.items() if isinstance(m, called) and not n.startswith("__")]


class Handle:
    """An object of the other process."""

    def __init__(self, side: Side, wire: Any, number: int, kind: str, methods: list[str]):
        self._side, self._wire, self._number, self._times = side, wire, number, 0
        self._kind, self._methods = kind, frozenset(methods)

    def __del__(self) -> None:
        self._side.dropped.append((self._number, self._times))

    def _ask(self, action: str, *args: Any) -> Any:
        return self._side.wire(self).ask(action, self, *args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in SHOWN:
            raise AttributeError(f"{self._kind} is in another process: its {name} stays there")
        if name in self._methods:
            return Method(self, name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._ask("setattr", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", None, args, kwargs or None)

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __float__(self) -> float:
        return float(self._ask("float"))

    def __int__(self) -> int:
        return int(self._ask("int"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __contains__(self, value: Any) -> bool:
        return bool(self._ask("contains", value))

    def __enter__(self) -> Any:
        return self._ask("call", "__enter__", (), None)

    def __exit__(self, *_: object) -> None:
        self._ask("call", "__exit__", (None, None, None), None)


class Method:
    """A method of a handle's object."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handle._ask("call", self._name, args, kwargs or None)


ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, name, args, kwargs: (getattr(target, name) if name else target)(
        *args, **(kwargs or {})
    ),
    **{
        action.__name__: action
        for action in (getattr, setattr, repr, iter, next, len, bool, float, int)
    },
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
}
