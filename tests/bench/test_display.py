"""Numbers, quantities and tables, against a table written by hand."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distlab.display import markdown_table, number, quantity, side_by_side, text_table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (7, "7"),
        (1234567, "1,234,567"),
        (-1234, "-1,234"),
        (10**12, "1,000,000,000,000"),
        (1.0, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (999.4, "999"),
        (999.5, "1,000"),
        (1234.5, "1,234"),
        (999999.7, "1,000,000"),
        (0.5, "0.500"),
        (0.9996, "1.00"),
        (0.0123, "0.0123"),
        (0.00123, "0.00123"),
        (0.001, "0.00100"),
        (0.0009, "9.00e-04"),
        (3e-17, "3.00e-17"),
        (-2.5e-9, "-2.50e-09"),
        (1e9, "1.00e+09"),
        (-45.67, "-45.7"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (None, "—"),
        (True, "True"),
        ("ring", "ring"),
        (np.float32(0.25), "0.250"),
        (np.int64(4096), "4,096"),
    ],
)
def test_number(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "B", "unknown"),
        (0, "B", "0 B"),
        (512, "B", "512 B"),
        (999.4, "B", "999 B"),
        (999.5, "B", "1.00 KB"),
        (1536, "B", "1.54 KB"),
        (1e9, "B", "1.00 GB"),
        (999.6e9, "B", "1.00 TB"),
        (-2.5e6, "B", "-2.50 MB"),
        (1e24, "B", "1,000,000 EB"),
        (2.86e11, "FLOP/s", "286 GFLOP/s"),
        (8.03e9, "params", "8.03 Gparams"),
        (1e9, "bit/s", "1.00 Gbit/s"),
        (4312, "tok/s", "4,312 tok/s"),
        (4312.4, "tok/s", "4,312 tok/s"),
        (0.4321, "", "0.432"),
        (43.21, "%", "43.2 %"),
        (0, "s", "0 s"),
        (0.25e-9, "s", "0.250 ns"),
        (3.2e-7, "s", "320 ns"),
        (999.6e-9, "s", "1.00 µs"),
        (1.5e-5, "s", "15.0 µs"),
        (0.0123, "s", "12.3 ms"),
        (0.9994, "s", "999 ms"),
        (0.9996, "s", "1.00 s"),
        (-0.002, "s", "-2.00 ms"),
        (1, "s", "1 s"),
        (299.4, "s", "299 s"),
        (300, "s", "5.0 min"),
        (3599, "s", "60.0 min"),
        (3600, "s", "1.0 h"),
        (7.2e6, "s", "2,000.0 h"),
        (math.nan, "s", "nan s"),
        (math.nan, "B", "nan B"),
        (math.inf, "s", "inf s"),
        (math.inf, "B", "inf B"),
    ],
)
def test_quantity(value, unit, shown):
    assert quantity(value, unit) == shown


@given(value=st.floats(1e-12, 1e12), sign=st.sampled_from([1, -1]))
def test_three_digits_are_right_and_the_sign_is_kept(value, sign):
    read_back = float(number(sign * value).replace(",", ""))
    assert read_back == pytest.approx(sign * value, rel=5.001e-3)  # half of the third digit


PREFIXES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600}


@given(value=st.floats(1, 1e20))
def test_bytes_read_back(value):
    shown, unit = quantity(value, "B").split()
    read_back = float(shown.replace(",", "")) * PREFIXES[unit.removesuffix("B")]
    assert read_back == pytest.approx(value, rel=5.001e-3)


@given(value=st.floats(1e-10, 1e9))
def test_seconds_read_back(value):
    shown, unit = quantity(value, "s").split()
    # One decimal of a minute or an hour: 1.0 h stands for 0.95 to 1.05 h.
    tolerance = 5.001e-3 if unit not in ("min", "h") else 0.05
    assert float(shown.replace(",", "")) * SECONDS[unit] == pytest.approx(value, rel=tolerance)


def test_text_table_has_numbers_to_the_right_and_words_to_the_left():
    rows = [["ring", 1, 0.5], ["a tree", 1024, None]]
    assert text_table(["how", "bytes", "share"], rows, caption="Two ways").splitlines() == [
        "Two ways",
        "how      bytes   share",
        "──────────────────────",
        "ring         1   0.500",
        "a tree   1,024       —",
    ]


def test_text_table_shows_brackets_and_colons_as_they_are():
    table = text_table(["axis [x]"], [["[red]loss[/red]"], [":warning: [rank]"]], "see [b] :x:")
    assert table.splitlines()[0] == "see [b] :x:"
    assert "axis [x]" in table and "[red]loss[/red]" in table and ":warning: [rank]" in table


def test_text_table_neither_folds_nor_cuts_what_is_wide():
    long = "word " * 60
    table = text_table(["a", "b"], [[long, 1], ["short", 2]], caption=long)
    lines = table.splitlines()
    assert len(lines) == 5 and "…" not in table
    assert lines[0] == long.strip() and long.strip() in lines[3]


def test_text_table_without_rows_still_shows_its_columns():
    assert "loss" in text_table(["step", "loss"], [])


def test_markdown_table():
    rows = [["a|b", 4096, 0.5], ["c", None, 2.0]]
    assert markdown_table(["how", "n", "x|y"], rows).splitlines() == [
        "| how | n | x\\|y |",
        "| --- | --: | --: |",
        "| a\\|b | 4,096 | 0.500 |",
        "| c | — | 2.00 |",
    ]


def test_a_prediction_stands_beside_its_measurement_and_error():
    assert side_by_side(0.11, 0.10, 1e3) == pytest.approx([110, 100, 10])
    assert side_by_side(1, 2) == [1, 2, -50]
    assert side_by_side(None, 0.1, 1e3) == [None, 100, None]
    assert side_by_side(1, 0) == [1, 0, None]


IN_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        (IN_C, b"- x... e 2 ok \\u4e2d \xff"),
        ({"PYTHONIOENCODING": "ascii"}, b"- x... e 2 ok \\u4e2d \xff"),
        ({"PYTHONIOENCODING": "latin-1"}, b"- \xd7... \xe9 \xb2 ok \\u4e2d \xff"),
        ({"PYTHONIOENCODING": "ascii:replace"}, b"? ?? ? ? ? ? ?"),
        ({"PYTHONIOENCODING": "utf-8"}, "─ ×… é ² ✓ 中 ".encode() + b"\xff"),
    ],
)
def test_every_character_can_be_written_in_every_locale(variables, shown):
    """The last is a file's name that is no text; "asked for in so many words" holds."""
    code = r"import distlab; print('\u2500 \xd7\u2026 \xe9 \xb2 \u2713 \u4e2d \udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True
    )
    assert (done.stdout, done.stderr) == (shown + b"\n", b"")


def test_a_closed_output_takes_everything():
    """Also where warnings are told: an open file at Python's end is one."""
    code = "import distlab, sys; print(1); sys.stdout.flush()"
    command = f"{sys.executable} -W default -c '{code}' >&-"
    assert subprocess.run(["sh", "-c", command], capture_output=True).stderr == b""
