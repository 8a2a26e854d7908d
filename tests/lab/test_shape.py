"""Shapes: numbers and their units are free, words are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distlab.display import number, quantity, text_table
from distlab.lab.shape import difference, shape, without_log


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("loss: 5.31 nats", "loss: 12 nats"),
        ("loss: 5.31 nats", "loss: -0.2 nats"),
        ("loss: 5.31 nats", "loss: nan nats"),
        ("diff 3.1e-07", "diff 0.0e+00"),
        ("memory: 1.20 MB", "memory: 512 B"),
        ("memory: 1.20 MB", "memory: unknown"),
        ("time: 12.3 ms", "time: 3.2 µs"),
        ("time: 12.3 ms", "time: 2.5 min"),
        ("rate: 286 GFLOP/s", "rate: 3.41 TFLOP/s"),
        ("link: 1.00 Gbit/s", "link: 12.5 Mbit/s"),
        ("copy: 12.1 GB/s", "copy: 999 MB/s"),
        ("speed: 4,312 tok/s", "speed: 31 tok/s"),
        ("size: 8.03 Gparams", "size: 124 Mparams"),
        ("error +1.2 %", "error -14.0 %"),
        ("error +1.2 %", "error unknown"),
        ("at 127.0.0.1:8000", "at 127.0.0.1:51234"),
        ("[1, 2, 3]", "[4, 5, 6]"),
        ("machine: a laptop, 8 cores", "machine: a server with 2 GPUs"),
        ("(2955, at least 361 wanted)", "(8.5e+04, at least 1,361.5 wanted)"),
        ("aten::mm 3 1.2", "aten::add 1 0.1"),
        ("a\nx: 1\nx: 2\nb", "a\nx: 3\nb"),
        ("a  \n\n b", "a\nb"),
        ("ring 3.2 —", "ring 3.2 4.5"),
        ("(1.2 ms)", "(3 s)"),
        ("node0| machine: a laptop", "node0| machine: a server"),
        ("node0| a\nnode1| b\nnode0| c", "node1| b\nnode0| a\nnode0| c"),
        ("2x faster", "13x faster"),
    ],
)
def test_the_same_shape(shown, printed):
    assert difference(shown, printed) == ""


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("check: sums … ok (max diff 1e-9)", "check: sums … FAILED (max diff 1e-3)"),
        ("loss: 5.31 nats", "loss: 5.31 bits"),
        ("rank0: 1", "rank1: 1"),  # a digit within a word is part of a name
        ("time: 3 steps", "time: 3 s"),
        ("inference: 3", "training: 3"),
        ("information", "3ormation"),
        ("unknowns: 3", "3s: 3"),
        ("a\nb", "a"),
        ("node0| a\nnode0| b", "node0| b\nnode0| a"),
        ("node0| a", "node1| a"),
        ("a\nb", "b\na"),
        ("a\nb\na\nb", "a\nb"),  # only neighbours are one line
        ("the machine: x", "the machine: y"),
        ("state", "State"),
        ("verdict: the step is compute-bound", "verdict: the step is memory-bound"),
        ("sample: bucket 0 has a to b", "sample: bucket 0 has a to c"),
        ("3 words", "words"),
    ],
)
def test_another_shape(shown, printed):
    assert difference(shown, printed) != ""


def test_a_line_is_free_whose_word_the_lesson_names():
    shown, printed = "sample: 'import os'\nend\n", "sample: 'def f'\nend\n"
    assert difference(shown, printed, free=["sample"]) == ""
    assert difference(f"node0| {shown}", f"node0| {printed}", free=["trace", "sample"]) == ""
    assert difference(shown, "end\n", free=["sample"]) != ""  # it must be there
    assert difference(shown, printed, free=["verdict"]) != ""


def test_a_difference_shows_both_sides():
    lines = difference("same\nold words\n", "same\nnew words\n").splitlines()
    assert lines[:2] == ["--- main.md", "+++ this run"]
    assert "-old words" in lines and "+new words" in lines and " same" in lines


@given(
    first=st.lists(st.tuples(st.floats(0, 1e12), st.integers(0, 10**9)), min_size=1, max_size=5),
    second=st.lists(st.tuples(st.floats(0, 1e12), st.integers(0, 10**9)), min_size=1, max_size=5),
)
def test_tables_of_the_same_columns_have_the_same_shape(first, second):
    one, other = (
        text_table(["time", "n"], rows, "A long caption of it") for rows in (first, second)
    )
    assert difference(one, other) == ""


@given(first=st.floats(0, 1e20), second=st.floats(0, 1e20))
@pytest.mark.parametrize(
    "unit", ["B", "B/s", "FLOP", "FLOP/s", "s", "%", "params", "bit/s", "tok/s", ""]
)
def test_every_quantity_has_the_shape_of_any_other_of_its_unit(unit, first, second):
    assert shape(f"x: {quantity(first, unit)}") == shape(f"x: {quantity(second, unit)}")


@given(value=st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.none())
def test_every_number_is_free(value):
    assert shape(f"x {number(value)} y") == ["x # y"]


def test_empty_texts():
    assert shape("") == shape("\n \n") == []
    assert difference("", "\n") == ""


def test_lines_of_torchs_log_count_as_not_printed():
    log = "W1121 11:04:35.106000 2792 torch/distributed/run.py:874] Setting OMP_NUM_THREADS\n"
    assert difference("a line\n", f"{log}a line\nnode0| {log}") == ""
    assert without_log(f"{log}a line\n") == "a line\n"


def test_what_a_small_run_does_not_judge_must_be_a_check_of_the_lesson():
    shown = "check: a step … ok (2 s, limit 3 s)\n"
    told = "check: a step … ok (not judged at this size: 5 s, limit 3 s)\n"
    assert not difference(shown, told)
    assert difference("", told) and difference(shown.replace("a step", "a loss"), told)
    assert difference(shown.replace("ok", "FAILED"), told)
