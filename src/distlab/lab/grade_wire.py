"""What goes between the grader and the process in which the student's code runs.

A message is JSON and raw bytes, never pickle: whoever reads it makes data of it and runs nothing.
Plain values and arrays are copied. Lists, dictionaries, sets, arrays, tensors and the grader's
dataclasses are *shared*: as long as both sides hold one, each message carries what has changed in
it since the last one, so that a test sees when its arguments were changed, or when a result is a
buffer that a later call writes to again. Everything else stays where it is, and the other side gets
a `Handle`. The grader hands out functions only, and they can be called, not looked into.
"""

import builtins
import dataclasses
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from distlab.lab.grade_handles import BrokenWire, Handle, Method, Side
from distlab.lab.grade_values import (
    Shared,
    changed,
    checked,
    named_tuple,
    numbers_type,
    only_here,
    record_class,
    state_of,
    torch_dtype,
    torch_type,
    type_code,
)

PLAIN = {type(None), bool, int, float, str}
HEADER = struct.Struct("!IQ")  # bytes of JSON, bytes of the blobs behind it
LARGEST_MESSAGE = 2**32
NO_MESSAGE = "what your code's process wrote to the grader is no message"
to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Wire:
    """One end of a connection: questions and answers in turn, each of which may ask back."""

    def __init__(self, side: Side, sock: socket.socket) -> None:
        self.side, self.sock = side, sock
        self.lock = threading.RLock()  # several threads of the student may call one's functions
        self.shared: dict[int, Shared] = {}
        self.keys: dict[int, int] = {}  # id of a shared object: its key
        self.next_key = side.key_parity
        self.touched: list[Shared] = []  # in the message that is being read or written
        self.blobs: list[Any] = []
        self.unread = bytearray()
        self.inbox: list[Any] = []
        self.errors: dict[int, BaseException] = {}  # ours, which may come back

    def ask(self, action: str, *args: Any) -> Any:
        """What the other side's `action` gives; raises what it raised."""
        with self.lock:
            self.send("ask", [action, *args])
            while (kind := self.receive()) == "ask":
                self.respond()
            answer = self.inbox.pop()
        if kind == "error":
            raise answer
        return answer

    def serve(self) -> None:
        """Answer questions until the connection ends."""
        while True:
            self.receive()
            self.respond()

    def respond(self) -> None:
        # Nothing here may hold the arguments: what nobody holds any more is no longer shared.
        try:
            self.send("answer", self.side.perform(*self.inbox.pop()))
        except BrokenWire:
            raise
        except BaseException as error:
            self.send("error", self.told(error))

    def send(self, kind: str, value: Any) -> None:
        before = list(self.shared)
        self.touched, self.blobs = [], []
        try:
            node = self.node_of(kind, value)
            del value
            entries = ((key, self.shared[key]) for key in before)
            updates = [self.describe(key, entry) for key, entry in entries if changed(entry)]
            dropped = [self.side.dropped.popleft() for _ in range(len(self.side.dropped))]
            sizes = [len(blob) for blob in self.blobs]
            message = [kind, node, updates, self.released(), dropped, sizes]
            text = to_json(message).encode()
        except BaseException:
            for key in self.shared.keys() - set(before):
                del self.keys[id(self.shared.pop(key).object)]
            raise
        head = HEADER.pack(len(text), sum(sizes))
        try:
            self.sock.sendall(b"".join([head, text, *self.blobs]))
        except OSError:
            self.side.ended()
        self.blobs = []

    def receive(self) -> str:
        """Read a message, leave its content in the inbox, and return its kind."""
        size, blob_size = HEADER.unpack(self.read(HEADER.size))
        if size + blob_size > LARGEST_MESSAGE:
            self.side.broken(NO_MESSAGE)
        text, blob = self.read(size), memoryview(self.read(blob_size))
        try:
            kind, node, updates, released, dropped, sizes = json.loads(text)
            ends = list(itertools.accumulate(sizes, initial=0))
            self.blobs = [blob[a:b] for a, b in itertools.pairwise(ends)]
            self.touched = []
            value = self.value_of(kind, node)
            for update in updates:
                self.decode(update)
            for entry in self.touched:
                entry.state = state_of(entry.object)
            for key in released:
                if key in self.shared:
                    del self.keys[id(self.shared.pop(key).object)]
            for number, times in dropped:
                self.side.forget(number, times)
            if kind not in ("ask", "answer", "error"):
                raise ValueError(kind)
        except Exception as error:
            self.side.broken(f"{NO_MESSAGE} ({type(error).__name__}: {error})")
        self.touched, self.blobs = [], []
        self.inbox.append(value)
        return str(kind)

    def read(self, size: int) -> bytes:
        while len(self.unread) < size:
            try:
                got = self.sock.recv(max(2**16, size - len(self.unread)))
            except BlockingIOError:  # the grader's limit on one wait
                self.side.check_alive()
                continue
            except OSError:
                got = b""
            if not got:
                self.side.ended()
            self.unread += got
        content = bytes(self.unread[:size])
        del self.unread[:size]
        return content

    # ---- from values to nodes

    def node_of(self, kind: str, value: Any) -> Any:
        if kind == "ask":
            return [self.encode(part) for part in value]
        return value if kind == "error" else self.encode(value)

    def encode(self, value: Any) -> Any:
        """A plain value as it is; of anything else a list that begins with what it is."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if (key := self.keys.get(id(value))) is not None:
            return ["ref", key]
        if kind in (list, dict, set) or isinstance(value, np.ndarray) or self.is_other(value):
            key, self.next_key = self.next_key, self.next_key + 2
            entry = self.shared[key] = Shared(value)
            self.keys[id(value)] = key
            return self.describe(key, entry)
        if isinstance(value, np.generic):
            return ["scalar", type_code(value.dtype), value.tobytes().hex()]
        if isinstance(value, bytes | bytearray):
            return ["bytes", self.blob(bytes(value)), isinstance(value, bytearray)]
        if isinstance(value, tuple):
            names = getattr(kind, "_fields", None)
            return ["tuple", self.items(value), names and [kind.__name__, names]]
        if isinstance(value, PurePath):
            return ["path", str(value)]
        if kind in (range, slice):
            return [kind.__name__, value.start, value.stop, value.step]
        if isinstance(value, frozenset):
            return ["frozenset", self.items(value)]
        if isinstance(value, np.dtype) or (
            isinstance(value, type) and issubclass(value, np.generic)
        ):
            return ["dtype", type_code(np.dtype(value)), isinstance(value, type)]
        if torch_type(value, "dtype"):
            return ["torch_dtype", str(value)]
        if isinstance(value, Handle):
            return ["yours", value._number, None]
        if isinstance(value, Method):
            return ["yours", value._handle._number, value._name]
        bases: tuple[Callable[..., Any], ...] = (int, float, list, dict, set)
        for base in bases:
            if isinstance(value, base):  # type: ignore[arg-type]  # of a class of one's own
                return self.encode(base(value))
        if isinstance(value, str):
            return str.__str__(value)
        return self.side.export(value)

    def is_other(self, value: Any) -> bool:
        """Whether it is a tensor, or one of the grader's dataclasses."""
        if torch_type(value, "Tensor"):
            return True
        mine = self.side.key_parity == 0
        return dataclasses.is_dataclass(value) and not isinstance(value, type) and mine

    def items(self, values: Iterable[Any]) -> Any:
        values = list(values)
        if set(map(type, values)) <= PLAIN:
            return {"=": values}
        return [self.encode(value) for value in values]

    def blob(self, content: Any) -> int:
        self.blobs.append(content)
        return len(self.blobs) - 1

    def describe(self, key: int, entry: Shared) -> list[Any]:
        """The node of something that is shared, and note its state."""
        value = entry.object
        entry.state = state_of(value)
        match value:
            case np.ndarray():
                code = type_code(value.dtype)
                shape, blob = list(value.shape), self.blob(entry.state)
                return ["array", key, code, shape, blob, bool(value.flags.writeable)]
            case list() | set():
                return [type(value).__name__, key, self.items(value)]
            case dict():
                return ["dict", key, self.items(value), self.items(value.values())]
        if torch_type(value, "Tensor"):
            shape, blob = list(value.shape), self.blob(entry.state)
            return ["tensor", key, str(value.dtype), shape, blob, bool(value.requires_grad)]
        names = [field.name for field in dataclasses.fields(value)]
        frozen = type(value).__dataclass_params__.frozen
        values = self.items(getattr(value, name) for name in names)
        return ["record", key, type(value).__name__, frozen, names, values]

    def released(self) -> list[int]:
        """Keys of what this side holds no longer: from now on the other one has it for itself."""
        released: list[int] = []
        while True:
            gone = [key for key, entry in self.shared.items() if only_here(entry)]
            if not gone:
                return released
            for key in gone:  # and what only these have held goes in the next round
                del self.keys[id(self.shared.pop(key).object)]
            released += gone

    def told(self, error: BaseException) -> Any:
        """An exception as data: its class, the next one of Python's own, arguments and place."""
        base = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
        plain = all(type(argument) in PLAIN for argument in error.args)
        args = list(error.args) if plain else [str(error)]
        origin = getattr(error, "_origin", None)
        if origin is None and self.side.key_parity == 0:
            origin = id(error)
            self.errors = {origin: error}  # the newest only
        place = self.side.place(error)
        return [type(error).__name__, base.__name__, args, place, origin]

    # ---- from nodes to values

    def value_of(self, kind: str, node: Any) -> Any:
        if kind == "ask":
            return [self.decode(part) for part in node]
        return self.raised(*node) if kind == "error" else self.decode(node)

    def decode(self, node: Any) -> Any:
        if type(node) in PLAIN:
            return node
        tag, *rest = node
        return DECODERS[tag](self, *rest)

    def decode_items(self, node: Any) -> list[Any]:
        if isinstance(node, dict):
            values = node["="]
            if type(values) is not list or not set(map(type, values)) <= PLAIN:
                raise ValueError("not plain")
            return values
        return [self.decode(item) for item in node]

    def opened(self, key: int, make: Callable[[], Any]) -> Any:
        """The shared object of this key; a new one where the key is new."""
        entry = self.shared.get(key)
        if entry is None:
            if type(key) is not int or key % 2 == self.side.key_parity:
                raise ValueError(f"key {key}")
            entry = self.shared[key] = Shared(make())
            self.keys[id(entry.object)] = key
        self.touched.append(entry)
        return entry.object

    def decode_ref(self, key: int) -> Any:
        return self.shared[key].object

    def decode_list(self, key: int, items: Any) -> list[Any]:
        target: list[Any] = checked(self.opened(key, list), list)
        target[:] = self.decode_items(items)
        return target

    def decode_set(self, key: int, items: Any) -> set[Any]:
        target: set[Any] = checked(self.opened(key, set), set)
        values = self.decode_items(items)
        target.clear()
        target.update(values)
        return target

    def decode_dict(self, key: int, names: Any, values: Any) -> dict[Any, Any]:
        target: dict[Any, Any] = checked(self.opened(key, dict), dict)
        content = list(zip(self.decode_items(names), self.decode_items(values), strict=True))
        target.clear()
        target.update(content)
        return target

    def decode_array(
        self, key: int, code: str, shape: list[int], blob: int, writeable: bool
    ) -> np.ndarray:
        found = np.frombuffer(self.blobs[blob], numbers_type(code)).reshape(shape)
        new = key not in self.shared
        target: np.ndarray = self.opened(key, lambda: np.empty(shape, found.dtype))
        if checked(target, np.ndarray).dtype != found.dtype or target.size != found.size:
            raise ValueError("an array changed its size or its dtype")
        if target.shape != found.shape:
            target.shape = found.shape
        if new or target.flags.writeable:
            target[...] = found
        if new and not writeable:
            target.setflags(write=False)
        return target

    def decode_tensor(
        self, key: int, dtype: str, shape: list[int], blob: int, requires_grad: bool
    ) -> Any:
        import torch

        kind = torch_dtype(dtype)
        new = key not in self.shared
        target = self.opened(key, lambda: torch.empty(shape, dtype=kind))
        content = torch.from_numpy(np.frombuffer(bytearray(self.blobs[blob]), np.uint8))
        with torch.no_grad():
            checked(target, torch.Tensor).copy_(content.view(kind).reshape(shape))
        return target.requires_grad_(requires_grad) if new else target

    def decode_record(
        self, key: int, name: str, frozen: bool, names: list[str], values: Any
    ) -> Any:
        kind = record_class(name, frozen, tuple(names))
        if key not in self.shared and self.side.key_parity == 0:
            raise ValueError("only the grader's dataclasses travel")
        target = self.opened(key, lambda: object.__new__(kind))
        fields = [field.name for field in dataclasses.fields(target)]
        for field, value in zip(fields, self.decode_items(values), strict=True):
            object.__setattr__(target, field, value)
        return target

    def decode_tuple(self, items: Any, kind: Any) -> tuple[Any, ...]:
        values = self.decode_items(items)
        if kind is None:
            return tuple(values)
        return named_tuple(kind[0], tuple(kind[1]))(*values)

    def decode_handle(self, number: int, kind: str, methods: list[str]) -> Handle:
        handle = self.side.handles.get(number)
        if handle is None:
            handle = Handle(self.side, self, number, kind, methods)
            self.side.handles[number] = handle
        object.__setattr__(handle, "_times", handle._times + 1)
        return handle

    def decode_yours(self, number: int, name: str | None) -> Any:
        target = self.side.exports[number][0]
        return getattr(target, name) if name and self.side.key_parity else target

    def raised(self, name: str, base: str, args: Any, place: str, origin: int | None) -> Any:
        """The exception that the other side told of; our own where it was ours."""
        if self.side.key_parity == 0 and origin in self.errors:
            return self.errors.pop(origin)
        known = checked(getattr(builtins, base), type)
        kind = known if issubclass(known, Exception) else RuntimeError
        if kind.__name__ != name:
            kind = type(name, (kind,), {})
        try:
            error = kind(*self.decode_items({"=": args}))
        except TypeError:
            error = RuntimeError(f"{name}: {args}")
        error.__dict__.update(place=place, _origin=origin)
        return error


DECODERS: dict[str, Callable[..., Any]] = {
    "ref": Wire.decode_ref,
    "list": Wire.decode_list,
    "set": Wire.decode_set,
    "dict": Wire.decode_dict,
    "array": Wire.decode_array,
    "tensor": Wire.decode_tensor,
    "record": Wire.decode_record,
    "tuple": Wire.decode_tuple,
    "handle": Wire.decode_handle,
    "yours": Wire.decode_yours,
    "frozenset": lambda wire, items: frozenset(wire.decode_items(items)),
    "bytes": lambda wire, blob, mutable: (bytearray if mutable else bytes)(wire.blobs[blob]),
    "scalar": lambda wire, code, digits: np.frombuffer(bytes.fromhex(digits), numbers_type(code))[
        0
    ],
    "path": lambda wire, text: Path(text),
    "range": lambda wire, *ends: range(*ends),
    "slice": lambda wire, *ends: slice(*ends),
    "dtype": lambda wire, code, plain: numbers_type(code).type if plain else numbers_type(code),
    "torch_dtype": lambda wire, name: torch_dtype(name),
}
