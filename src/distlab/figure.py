"""Draw the figures of a record: one place decides how the book's figures look."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from distlab.files import atomic_write

# Okabe and Ito's palette, told apart by colour-blind readers too (jfly.uni-koeln.de/color, 2008).
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


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
        if spec["log_x"]:
            axes.set_xscale("log", base=2)
            if axes.get_xlim()[1] < 10_000:  # 64 reads better than a power of two
                axes.xaxis.set_major_formatter(ScalarFormatter())
        if spec["log_y"]:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(spec["series"]) > 1 or spec["lines"]:
            axes.legend(frameon=False)
        with atomic_write(path) as temporary, plt.rc_context({"svg.hashsalt": "distlab"}):
            figure.savefig(temporary, dpi=150, metadata=_no_date(path))
    finally:
        plt.close(figure)


def _plain(text: str) -> str:
    """`text` as it stands: Matplotlib would set what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def _no_date(path: Path) -> dict[str, Any]:
    """The same record gives the same file, so that a redrawn figure is no change."""
    return {"Date": None} if path.suffix == ".svg" else {"Software": None}


def _lines(axes: Axes, spec: Mapping[str, Any]) -> None:
    for index, series in enumerate(spec["series"]):
        few = len(series["x"]) <= 24
        axes.plot(
            series["x"],
            _heights(series),
            label=_plain(series["label"]),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)] if few else None,
            linewidth=1.8,
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


def _heights(series: Mapping[str, Any]) -> list[float]:
    """A series' y; what a record holds as null, as JSON has no NaN, leaves a gap."""
    return [math.nan if y is None else y for y in series["y"]]


def _marks(axes: Axes, spec: Mapping[str, Any]) -> None:
    for index, mark in enumerate(spec["lines"]):
        style: dict[str, Any] = {
            "linestyle": ("--", ":", "-.")[index % 3],
            "color": "0.35",
            "label": _plain(mark["label"]),
        }
        if "y" in mark:
            axes.axhline(mark["y"], **style)
        else:
            axes.axvline(mark["x"], **style)


_DRAWERS = {"line": _lines, "scatter": _scatter, "bar": _bars, "area": _area}
