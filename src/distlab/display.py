"""Numbers, quantities and tables as people read them: on the terminal and in main.md."""

import codecs
import io
import math
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

WIDTH = 100_000  # a table is neither folded nor cut: a reader can scroll
_UP = ["", "K", "M", "G", "T", "P", "E"]
_SCALED_UNITS = ("B", "B/s", "FLOP", "FLOP/s", "params", "bit/s")
IN_ASCII = {
    **{"─": "-", "━": "-", "│": "|", "…": "...", "—": "-", "–": "-", "·": "*", "×": "x", "÷": "/"},
    **{"−": "-", "±": "+-", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "←": "<-"},
    **{"µ": "u", "μ": "u", "✓": "ok", "✗": "no", "’": "'", "‘": "'", "“": '"', "”": '"'},
    **{"╰": "+", "▶": ">", "∞": "inf", "√": "sqrt", "Σ": "sum", "Δ": "delta"},
}


def make_output_safe() -> None:
    """Have standard output and errors take every character, whatever their encoding is.

    One that the encoding lacks (a Latin-1 or C locale, PYTHONIOENCODING) becomes ASCII: a table's
    line is drawn with `-`, `…` is three dots, `é` an e. A byte of a file's name that is no text
    goes out as it came. What was asked for in so many words, as PYTHONIOENCODING=ascii:replace,
    holds. A stream that is closed takes everything, too. `import distlab` calls this.
    """
    codecs.register_error("distlab.ascii", _in_ascii)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # not the stream's, which would be warned of
            stream = open(nowhere, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in (
            *("strict", "surrogateescape"),  # stdout's, and in the C locale
            "backslashreplace",  # stderr's
        ):
            stream.reconfigure(errors="distlab.ascii")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """For `codecs.register_error`: what stands for the first character that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, after = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # surrogateescape's, see PEP 383
        return bytes([ord(character) - 0xDC00]), after
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    code = character.encode("ascii", "backslashreplace").decode("ascii")
    return IN_ASCII.get(character) or plain or code, after


def quantity(value: float | None, unit: str = "") -> str:
    """`value` with its unit, scaled where that is usual: 1.5 GB, 12.3 ms, 286 GFLOP/s, 4,312 tok/s.

    The prefixes are decimal (1 GB = 1e9 bytes), as in data sheets.
    """
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return f"{float(value)} {unit}".rstrip()
    if unit == "s":
        return _seconds(value)
    if unit in _SCALED_UNITS:
        step = 0
        scaled = float(value)
        while abs(scaled) >= 999.5 and step < len(_UP) - 1:
            scaled, step = scaled / 1000, step + 1
        return f"{number(scaled)} {_UP[step]}{unit}"
    if unit == "%":
        return f"{value:.1f} %"
    return f"{number(value)} {unit}".rstrip()


def _seconds(value: float) -> str:
    size = abs(value)
    if size == 0 or size >= 0.9995:  # less is shown as at most 999 ms
        if size < 300:
            return f"{number(value)} s"
        hours = value / 3600
        return f"{value / 60:.1f} min" if size < 3600 else f"{hours:,.1f} h"
    for unit, scale in (("ms", 1e3), ("µs", 1e6)):
        if size * scale >= 0.9995:
            return f"{number(value * scale)} {unit}"
    return f"{number(value * 1e9)} ns"


def number(value: Any) -> str:
    """A number in three significant digits, from 1,000 on in whole ones; an integer in full."""
    if value is None:
        return "—"
    if isinstance(value, bool | str):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size == 0:
        return "0"
    if not math.isfinite(size):
        return str(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    if size >= 999.5:
        return f"{value:,.0f}"
    rounded = float(f"{size:.2e}")  # 9.996 becomes 10.0, not 10.00
    return f"{value:.{2 - math.floor(math.log10(rounded))}f}"


def side_by_side(
    predicted: float | None, measured: float, scale: float = 1.0
) -> list[float | None]:
    """A prediction, its measurement (both times `scale`) and the prediction's error in percent:
    three cells of a row. A prediction of None is unknown, and so is its error."""
    if predicted is None:
        return [None, scale * measured, None]
    error = 100 * (predicted - measured) / measured if measured else None
    return [scale * predicted, scale * measured, error]


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """A table for the terminal: numbers to the right, words to the left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = rows and not isinstance(rows[0][index], str)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(number(cell) for cell in row))
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False
    )
    console.print(table)
    lines = (line.rstrip() for line in [caption, *buffer.getvalue().splitlines()])
    return "\n".join(line for line in lines if line)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table in Markdown, for main.md."""
    numeric = [bool(rows) and not isinstance(rows[0][i], str) for i in range(len(columns))]
    lines = [list(columns), ["--:" if right else "---" for right in numeric]]
    lines += [[number(cell) for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def write_line(text: str) -> None:
    """Print `text` in one piece: print() writes twice under torchrun, and ranks may mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
