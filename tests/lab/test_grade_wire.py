"""What goes between the grader and the student's process: values, changes, handles, garbage."""

import copy
import socket
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distlab.lab.grade_handles import BrokenWire
from distlab.lab.grade_student import Inside, Student
from distlab.lab.grade_wire import HEADER, Wire


class Here(Student):
    """The grader's side, whose student is a thread of this process."""

    def __init__(self):
        super().__init__(0, None)
        ours, its = socket.socketpair()
        self.wire_ = Wire(self, ours)
        self.far = its

    def connected(self):
        return self.wire_

    def ended(self):
        self.broken("ended")


@pytest.fixture(scope="module")
def here():
    side = Here()
    threading.Thread(target=Inside(Path("/nowhere")).answer, args=(side.far,), daemon=True).start()
    yield side
    side.wire_.sock.close()


@pytest.fixture(scope="module")
def there(here):
    """A module at the other end."""
    return here.wire_.ask("rig", "far_end", FAR_END)


FAR_END = """
import copy, collections
import numpy as np
copied = copy.deepcopy
kept = []
def keep(value): kept.append(value)
def appended(values, value): values.append(value); return values
def filled(array, value): array[...] = value
def renamed(record, name): record.name = name
def called(function, *args): return function(*args)
def divided(a, b): return a / b
def buffer(size): kept.append(np.zeros(size)); return kept[-1]
def part(size): kept.append(np.zeros(size)); return kept[-1][1:]
def write(value): kept[-1][...] = value
def numbers(): yield from range(3)
class Failure(ValueError): pass
def fail(text): raise Failure(text)
class Counter:
    step = 0
    def next(self): self.step += 1; return self.step
"""

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
kinds = arrays.scalar_dtypes().filter(lambda dtype: dtype.kind in "biufc")
leaves = (
    scalars
    | st.binary()
    | kinds.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0)))
    | kinds.flatmap(lambda dtype: arrays.from_dtype(dtype))
    | st.builds(range, st.integers(), st.integers())
    | st.sets(scalars)
    | st.frozensets(scalars)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(scalars, inner),
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_a_value_comes_back_as_it_went(there, value):
    assert form(there.copied(value)) == form(copy.deepcopy(value))


def form(value):
    """Something to compare by ==: with types, with NaNs, with -0.0."""
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return "dict", [(form(k), form(v)) for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return type(value), [form(item) for item in value]
    return type(value), repr(value)


def test_tensors_and_other_values_come_back_too(there):
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool):
        several = torch.tensor(1), torch.zeros(0, 3), torch.arange(12).reshape(3, 4).T
        unusual = torch.zeros(()).expand(0), torch.tensor(5).expand(1)  # their stride is 0
        for tensor in (*several, *unusual):
            sent = tensor.to(dtype)
            got = there.copied(sent)
            assert got.dtype == dtype and torch.equal(got, sent) and got is not sent
    assert there.copied(torch.ones(2, requires_grad=True)).requires_grad
    pair = namedtuple("Pair", "a b")(1, [2])
    assert there.copied(pair)._asdict() == {"a": 1, "b": [2]}
    assert there.copied(OrderedDict(a=1)) == {"a": 1}
    assert [there.copied(x) for x in (np.dtype("f4"), np.int8, torch.float16, Path("/a"))] == [
        np.dtype("f4"), np.int8, torch.float16, Path("/a"),
    ]  # fmt: skip
    with pytest.raises(TypeError, match="object cannot leave its process"):
        there.copied(np.array([None]))
    assert there.copied([1]) == [1], "an error has spoilt the connection"


@dataclass
class Request:
    name: str
    blocks: list


def test_what_is_changed_on_one_side_is_changed_on_the_other(there):
    values, array, request = [1], np.zeros((2, 3))[:, ::2], Request("a", [1])
    assert there.appended(values, values) is values and values[1] is values
    there.filled(array, 7)
    there.renamed(request, "b")
    assert (array == 7).all() and request == Request("b", [1])
    closed = np.zeros(2)
    closed.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        there.filled(closed, 1)
    there.keep(array)
    array[0] = 5
    assert (there.kept[-1] == array).all(), "a kept argument does not follow the caller's"
    buffer, part = there.buffer(3), there.part(3)
    there.write(2)
    assert (part == 2).all() and (buffer == 0).all()


def test_what_nobody_holds_is_no_longer_shared(here, there):
    there.kept.clear()
    for _ in range(3):
        there.copied([np.zeros(2), {"a": [1]}])
        there.called(lambda value: value, [np.zeros(3)])
    there.divided(1, 1)
    assert len(here.wire_.shared) <= 1


def test_functions_exceptions_and_objects_stay_where_they_are(there):
    assert there.called(lambda a, b: a - b, 5, 3) == 2
    assert there.called(lambda: there.called(lambda: "deep")) == "deep"
    error = KeyError("mine")

    def fail():
        raise error

    with pytest.raises(KeyError) as caught:
        there.called(fail)
    assert caught.value is error
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        there.divided(1, 0)
    with pytest.raises(ValueError, match="bad") as caught:
        there.fail("bad")
    assert type(caught.value).__name__ == "Failure"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = there.nothing
    counter = there.Counter()
    assert [counter.next(), counter.next(), counter.step] == [1, 2, 2]
    assert list(there.numbers()) == [0, 1, 2]
    with pytest.raises(TypeError, match="cannot be handed"):
        there.copied(object())
    assert np.asarray(counter).dtype == object, "a handle gave an address in the other's memory"


def message(text, blobs=b""):
    return HEADER.pack(len(text), len(blobs)) + text + blobs


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 200,
        message(b"{}"),
        message(b'["answer", ["ref", 9], [], [], [], []]'),
        message(b'["answer", ["eval", "1"], [], [], [], []]'),
        message(b'["answer", ["list", 0, {"=": [[]]}], [], [], [], []]'),
        message(b'["answer", ["array", 1, "O", [1], 0, true], [], [], [], [8]]', bytes(8)),
        message(b'["answer", ["array", 1, "<f8", [9], 0, true], [], [], [], [8]]', bytes(8)),
        message(b'["answer", ["record", 1, "A", false, ["a"], {"=": [1]}], [], [], [], []]'),
        message(b'["error", ["A", "exec", [], "", null], [], [], [], []]'),
        message(b"[" * 100_000),
    ],
)
def test_garbage_breaks_the_wire_and_nothing_else(answer):
    side = Here()
    side.far.sendall(answer)
    with pytest.raises(BrokenWire, match="is no message"):
        side.wire_.ask("repr", 1)
    assert side.failure


def test_the_grader_runs_nothing_but_what_it_handed_out():
    side = Here()
    side.far.sendall(message(b'["ask", ["getattr", 1, "real"], [], [], [], []]'))
    side.far.sendall(message(b'["answer", 5, [], [], [], []]'))
    assert side.wire_.ask("repr", 1) == 5
    assert b"the grader's functions can be called" in side.far.recv(10_000)
