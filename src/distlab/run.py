"""One run of a script: it prints what it measures and checks, and keeps the same as a record."""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from distlab import check, files, record
from distlab.display import quantity, text_table, write_line
from distlab.launch import own_rank

Item = TypeVar("Item")
FIGURE_KINDS = ("line", "scatter", "bar", "area", "matrix", "timeline")


CHECKOUT = Path(__file__).resolve().parents[2]


def _without_the_checkout(value: Any) -> Any:
    """A path below it by its rest, so that a record names no folder of one machine."""
    inside = isinstance(value, Path) and value.is_relative_to(CHECKOUT)
    return value.relative_to(CHECKOUT) if inside else value


class Run:
    """Collects metrics, comparisons, checks, tables and figures; writes the record at the end.

    In a job of several ranks every rank makes the same calls: rank 0 prints and records, and a
    check that fails on another rank is printed by that rank and fails its process. The record goes
    to --json, and into $LAB_RECORD_DIR where `lab run` and the tests set it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank = own_rank()
        self.is_main = self.rank == 0
        self.checks: list[check.Check] = []
        self.metrics: dict[str, dict[str, Any]] = {}
        self.comparisons: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, dict[str, Any]] = {}
        self.extras: dict[str, Any] = {}

    def __enter__(self) -> Self:
        from distlab.hardware import machine, machine_line

        self.started = time.perf_counter()
        if self.is_main:
            if self.args.json is not None:
                files.refuse_unwritable_file("--json", self.args.json)
            if self.args.figures is not None:
                files.refuse_unwritable_folder("--figures", self.args.figures)
        self.print(f"machine: {machine_line(machine())}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or not self.is_main:
            return
        made = self.as_record()
        if self.args.json:
            record.save(made, self.args.json)
        if folder := os.environ.get("LAB_RECORD_DIR"):
            record.save(made, _unused_name(Path(folder), Path(sys.argv[0]).stem))
        if self.args.figures:
            from distlab.figure import draw_all

            for path in draw_all(made, Path(self.args.figures)):
                self.print(f"figure: {path}")

    @property
    def status(self) -> int:
        """The script's exit status: 0 when every check holds, else 1."""
        return 0 if all(item.ok for item in self.checks) else 1

    def as_record(self) -> dict[str, Any]:
        """The record so far, in JSON's types."""
        return {
            **record.describe_run(self.args.preset),
            "arguments": {
                name: _without_the_checkout(value)
                for name, value in vars(self.args).items()
                if name not in ("json", "figures") and not callable(value)
            },
            "seconds": round(time.perf_counter() - self.started, 3),
            "metrics": self.metrics,
            "comparisons": self.comparisons,
            "checks": [item.as_json() for item in self.checks],
            "tables": self.tables,
            "figures": self.figures,
            **self.extras,
        }

    def print(self, text: str = "") -> None:
        """Print on rank 0."""
        if self.is_main:
            write_line(text)

    def metric(self, name: str, value: float | None, unit: str = "", note: str = "") -> None:
        """Record and print one measured number; None is shown as unknown."""
        self.metrics[name] = {"value": value, "unit": unit}
        shown = f"{name.replace('_', ' ')}: {quantity(value, unit)}"
        self.print(f"{shown} ({note})" if note else shown)

    def compare(self, name: str, predicted: float, measured: float, unit: str = "") -> None:
        """Record and print a prediction, its measurement and its error, side by side."""
        error = (predicted - measured) / measured if measured else None
        self.comparisons[name] = {
            "predicted": predicted,
            "measured": measured,
            "unit": unit,
            "error": error,
        }
        shown = "unknown" if error is None else f"{100 * error:+.1f} %"
        self.print(
            f"{name}: predicted {quantity(predicted, unit)}, "
            f"measured {quantity(measured, unit)}, error {shown}"
        )

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = ""
    ) -> None:
        """Record and print a table. `rows` hold strings and numbers, one entry a column."""
        self.tables[name] = {
            "columns": list(columns),
            "rows": [list(row) for row in rows],
            "caption": caption,
        }
        self.print(text_table(columns, rows, caption))

    def figure(
        self,
        name: str,
        *,
        kind: str,
        title: str,
        x_label: str,
        y_label: str,
        series: Sequence[dict[str, Any]],
        log_x: bool = False,
        log_y: bool = False,
        lines: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Record a figure as data, so that it can be drawn again from the record alone.

        `kind` is line, scatter, bar, area (stacked), matrix or timeline; a series is `{"label",
        "x", "y"}`. A line's series with "points" true has no line, one with "dashed" true goes with
        the one before it. A matrix's series is a row: its x are the columns' names, and its "text",
        if any, stands in the cells. A timeline's is a row of spans: x `[begin, end]`, y their
        names. `lines` are `{"label", "y"}` or `{"label", "x"}` for marks across the whole figure.
        """
        if kind not in FIGURE_KINDS:
            raise ValueError(f"{kind!r} is no kind of figure; use {', '.join(FIGURE_KINDS)}")
        self.figures[name] = {
            "kind": kind,
            "title": title,
            "x_label": x_label,
            "y_label": y_label,
            "series": list(series),
            "log_x": log_x,
            "log_y": log_y,
            "lines": list(lines),
        }

    def extra(self, **keys: Any) -> None:
        """Put further keys at the top level of the record."""
        self.extras.update(keys)

    def check_close(
        self, name: str, actual: Any, expected: Any, tolerance: float, relative: bool = False
    ) -> bool:
        """See `distlab.check.close`."""
        return self._checked(check.close(name, actual, expected, tolerance, relative))

    def check_equal(self, name: str, actual: Any, expected: Any) -> bool:
        """See `distlab.check.equal`."""
        return self._checked(check.equal(name, actual, expected))

    def check_below(
        self, name: str, value: float, limit: float, unit: str = "", of_time: bool = False
    ) -> bool:
        """See `distlab.check.below`; `of_time`: of one run, and not judged at smoke size, which
        shows no speed. Where there are repeats use `check_within`."""
        judged = not of_time or self.args.preset != "smoke"
        return self._checked(check.below(name, value, limit, unit, judged, one_run=of_time))

    def check_above(
        self, name: str, value: float, limit: float, unit: str = "", of_time: bool = False
    ) -> bool:
        """See `distlab.check.above`; `of_time`: as in `check_below`."""
        judged = not of_time or self.args.preset != "smoke"
        return self._checked(check.above(name, value, limit, unit, judged, one_run=of_time))

    def check_within(
        self,
        name: str,
        samples: Sequence[float] | Mapping[str, Sequence[float]],
        limit: float = math.inf,
        at_least: float = -math.inf,
        unit: str = "",
        more: str = "--repeats",
        quantile: float = 0.5,
        any_size: bool = False,
    ) -> bool:
        """See `distlab.check.within`; at smoke size, which shows no speed, it is not judged, but
        with `any_size`: where the limit was asked for by a flag, or the time is a planted one."""
        judged = any_size or self.args.preset != "smoke"
        return self._checked(
            check.within(name, samples, limit, at_least, unit, more, judged, quantile)
        )

    def check_true(self, name: str, ok: bool, detail: str) -> bool:
        """See `distlab.check.true`."""
        return self._checked(check.true(name, ok, detail))

    def _checked(self, item: check.Check) -> bool:
        self.checks.append(item)
        if self.is_main:
            self.print(str(item))
        elif not item.ok:
            write_line(f"[rank {self.rank}] {item}")
        return item.ok

    def progress(
        self, items: Iterable[Item], label: str, total: int | None = None
    ) -> Iterator[Item]:
        """Iterate, showing how far it is on stderr: a bar on a terminal, else a line every 10 s."""
        if total is None:
            total = len(items) if isinstance(items, Sized) else None
        if not self.is_main:
            yield from items
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            yield from track(items, label, total, console=Console(stderr=True), transient=True)
        else:
            yield from _plain_progress(items, label, total)


def _plain_progress(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{label}: {done}{f'/{total}' if total else ''}", file=sys.stderr, flush=True)
        yield item


def _unused_name(folder: Path, stem: str) -> Path:
    """`stem.json`, or `stem-2.json` and so on when a block runs the same script again."""
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path
