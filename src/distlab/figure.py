"""Draw the figures of a record: one place decides how the book's figures look."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)

from distlab.display import number
from distlab.files import atomic_write

# Okabe and Ito's palette, told apart by colour-blind readers too (jfly.uni-koeln.de/color, 2008).
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
MOST_NAMES = 24  # on an axis of a matrix
LINE_STYLES = ["--", ":", "-.", (0, (8, 3)), (0, (4, 2, 1, 2, 1, 2))]  # of marks, each once
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


def two_lines(
    label: str, x: Sequence[float], *, measured: Sequence[float], predicted: Sequence[float]
) -> list[dict[str, Any]]:
    """The series of a measured line, and of its prediction dashed in the same colour."""
    return [
        {"label": f"{label}, measured", "x": [*x], "y": [*measured], "dashed": False},
        {"label": f"{label}, predicted", "x": [*x], "y": [*predicted], "dashed": True},
    ]


def draw_all(record: Mapping[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Draw every figure of `record` into `folder` as PREFIXNAME.png; the paths written."""
    paths = []
    for name, spec in record["figures"].items():
        path = folder / f"{prefix}{name}.png"
        draw(spec, path)
        paths.append(path)
    return paths


def draw(spec: Mapping[str, Any], path: Path) -> None:
    """Draw one figure (see `Run.figure` for its form) into `path`; the suffix gives the format."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    try:
        _DRAWERS[spec["kind"]](axes, spec)
        _marks(axes, spec)
        across, up = _plain(spec["x_label"]), _plain(spec["y_label"])
        if axes.yaxis_inverted():  # lying bars
            across, up = up, across
        axes.set(title=_plain(spec["title"]), xlabel=across, ylabel=up)
        _scale_axes(axes, spec)
        if spec["kind"] != "matrix":
            axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if axes.get_legend_handles_labels()[0] and (len(spec["series"]) > 1 or spec["lines"]):
            many = len(axes.get_legend_handles_labels()[0]) > 6
            # Its words can be read on a line, and a line under it can be seen.
            axes.legend(framealpha=0.8, edgecolor="none", fontsize="small" if many else None)
        with atomic_write(path) as temporary, plt.rc_context({"svg.hashsalt": "distlab"}):
            figure.savefig(temporary, dpi=150, metadata=_no_date(path))
    finally:
        plt.close(figure)


def _scale_axes(axes: Axes, spec: Mapping[str, Any]) -> None:
    """Logarithmic where the figure says so, with plain numbers while they are short."""
    if spec["log_x"]:
        axes.set_xscale("log", base=2)
        if axes.get_xlim()[1] < 10_000:  # 64 reads better than a power of two
            small = axes.get_xlim()[0] < 1  # a fraction, which ScalarFormatter rounds to 0
            plain = FuncFormatter(lambda x, _: f"{x:g}") if small else ScalarFormatter()
            axes.xaxis.set_major_formatter(plain)
    elif spec["kind"] == "line" and _whole([x for one in spec["series"] for x in one["x"]]):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there are no 1.5 nodes
    if spec["log_y"]:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if low > 1e-3 and high < 1e4:
            few = high / low < 100  # then a power of ten alone is too rare
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def _whole(numbers: Sequence[float]) -> bool:
    """Whether these are whole numbers, such as counts of nodes, and not very many."""
    return len(set(numbers)) < MOST_NAMES and all(
        isinstance(x, int | float) and float(x).is_integer() for x in numbers
    )


def _plain(text: str) -> str:
    """`text` as it stands: Matplotlib would set what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def _no_date(path: Path) -> dict[str, Any]:
    """The same record gives the same file, so that a redrawn figure is no change."""
    return {"Date": None} if path.suffix == ".svg" else {"Software": None}


def _lines(axes: Axes, spec: Mapping[str, Any]) -> None:
    index = -1
    for series in spec["series"]:
        dashed = series.get("dashed", False)
        index += 0 if dashed else 1  # it has the colour of the one before it
        few = len(series["x"]) <= 24 and not dashed
        axes.plot(
            series["x"],
            _heights(series),
            label=_plain(series["label"]),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)] if few else None,
            linewidth=0 if series.get("points") else 1.8,
            linestyle="--" if dashed else "-",
        )


def _scatter(axes: Axes, spec: Mapping[str, Any]) -> None:
    for index, series in enumerate(spec["series"]):
        axes.scatter(
            series["x"],
            _heights(series),
            label=_plain(series["label"]),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            s=24,
        )


def _bars(axes: Axes, spec: Mapping[str, Any]) -> None:
    """Groups of bars: every series has one bar at each x, which is a label; long ones lie down."""
    labels = [_plain(str(x)) for x in spec["series"][0]["x"]]
    lying = sum(map(len, labels)) > 60
    draw_bars = axes.barh if lying else axes.bar
    width = 0.8 / len(spec["series"])
    for index, series in enumerate(spec["series"]):
        shift = (index - (len(spec["series"]) - 1) / 2) * width
        places = [position + shift for position in range(len(labels))]
        colour = COLOURS[index % len(COLOURS)]
        draw_bars(places, _heights(series), width, label=_plain(series["label"]), color=colour)
    if lying:
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()  # the first on top
    else:
        axes.set_xticks(range(len(labels)), labels)


def _area(axes: Axes, spec: Mapping[str, Any]) -> None:
    """Series stacked on each other; all have the same x."""
    axes.stackplot(
        spec["series"][0]["x"],
        [_heights(series) for series in spec["series"]],
        labels=[_plain(series["label"]) for series in spec["series"]],
        colors=[COLOURS[i % len(COLOURS)] for i in range(len(spec["series"]))],
        alpha=0.85,
    )


def _matrix(axes: Axes, spec: Mapping[str, Any]) -> None:
    """A cell for each number, darker where it is larger; the first series is the top row."""
    rows = spec["series"][::-1]
    values = np.array([_heights(row) for row in rows])
    words = [row.get("text") or [number(y) for y in row["y"]] for row in rows]
    image = axes.imshow(values, cmap="Blues", origin="lower", aspect="auto")
    columns = [_plain(str(x)) for x in rows[0]["x"]]
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, [_plain(r["label"]) for r in rows])):
        step = math.ceil(len(names) / MOST_NAMES)
        axis.set_ticks(range(0, len(names), step), names[::step])
    axes.tick_params(labelsize=7 if len(columns) > 8 else 9)
    if len(columns) > MOST_NAMES:  # too small to be written in
        meaning = dict(zip(values.flat, (word for row in words for word in row), strict=True))
        ticks = sorted(meaning) if "text" in rows[0] else None
        bar = plt.colorbar(image, ax=axes, ticks=ticks)
        if ticks:
            bar.set_ticklabels([_plain(meaning[value]) for value in ticks])
        return
    low, high = image.get_clim()
    middle = (low + high) / 2 if np.isfinite(values).any() else 0.0
    style: dict[str, Any] = {"ha": "center", "va": "center", "size": 6 if len(columns) > 12 else 8}
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > middle else "black"
        axes.text(column, row, _plain(words[row][column]), color=colour, **style)


def _timeline(axes: Axes, spec: Mapping[str, Any]) -> None:
    """Spans on rows, the first series on top; a colour for each name that spans have."""
    rows = spec["series"][::-1]
    names = list(dict.fromkeys(name for row in spec["series"] for name in row["y"]))
    for index, name in enumerate(names):
        spans = [
            (place, begin, end - begin)
            for place, row in enumerate(rows)
            for (begin, end), own in zip(row["x"], row["y"], strict=True)
            if own == name
        ]
        places, begins, lengths = zip(*spans, strict=True)
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(places, lengths, 0.7, left=begins, label=_plain(name), color=colour)
    axes.set_yticks(range(len(rows)), [_plain(row["label"]) for row in rows])
    axes.tick_params(axis="y", labelsize=7 if len(rows) > 12 else 9)


def _heights(series: Mapping[str, Any]) -> list[float]:
    """A series' y; what a record holds as null, as JSON has no NaN, leaves a gap."""
    return [math.nan if y is None else y for y in series["y"]]


def _marks(axes: Axes, spec: Mapping[str, Any]) -> None:
    for index, mark in enumerate(spec["lines"]):
        style: dict[str, Any] = {
            "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
            "color": "0.35",
            "label": _plain(mark["label"]),
        }
        if "y" in mark:
            axes.axhline(mark["y"], **style)
        else:
            axes.axvline(mark["x"], **style)


_DRAWERS = {
    "line": _lines,
    "scatter": _scatter,
    "bar": _bars,
    "area": _area,
    "matrix": _matrix,
    "timeline": _timeline,
}
