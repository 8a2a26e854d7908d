"""Figures: every kind is drawn whole, and the same record gives the same file."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from distlab import figure
from distlab.run import FIGURE_KINDS

SPEC = {
    "kind": "line",
    "title": "Loss",
    "x_label": "step",
    "y_label": "loss (nats)",
    "series": [{"label": f"run {k}", "x": [1, 2, 4], "y": [3.0, 2.0 + k, 1.0]} for k in range(10)],
    "log_x": False,
    "log_y": False,
    "lines": [{"label": "entropy", "y": 2.5}, {"label": "knee", "x": 2}],
}


def test_every_kind_that_a_run_accepts_has_a_drawer():
    assert set(FIGURE_KINDS) == figure._DRAWERS.keys()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes_and_closes_what_it_opened(suffix, tmp_path):
    opened = plt.get_fignums()
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        figure.draw(SPEC, path)
    assert first.read_bytes() == second.read_bytes()
    assert plt.get_fignums() == opened


def test_bars_that_go_below_zero_are_seen(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(plt, "close", lambda drawn: limits.append(drawn.axes[0].get_ylim()))
    series = [{"label": "error", "x": ["a", "b"], "y": [-3.0, 1.0]}]
    figure.draw({**SPEC, "kind": "bar", "series": series, "lines": []}, tmp_path / "a.png")
    positive = [{"label": "bytes", "x": ["a", "b"], "y": [3.0, 1.0]}]
    figure.draw({**SPEC, "kind": "bar", "series": positive, "lines": []}, tmp_path / "b.png")
    assert limits[0][0] <= -3 and limits[1][0] == 0
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("size", [1, 8, 40])  # 40: too many to write in
@pytest.mark.parametrize("text", [True, False])
def test_a_matrix_is_drawn_with_its_first_row_on_top(monkeypatch, tmp_path, size, text):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    names = [f"GPU{i}" for i in range(size)]
    rows = [{"label": a, "x": names, "y": [None if a == b else 5 for b in names]} for a in names]
    for row in rows if text else []:
        row["text"] = ["—" if y is None else "NV5" for y in row["y"]]
    figure.draw({**SPEC, "kind": "matrix", "series": rows, "lines": []}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_yticklabels()[0].get_text().startswith("GPU")
    assert axes.get_yticklabels()[-1].get_text() == ("GPU0" if size < 40 else "GPU1")
    assert len(axes.texts) == (size * size if size < 40 else 0)
    assert axes.get_xlabel() == SPEC["x_label"] and axes.get_legend() is None
    monkeypatch.undo()
    plt.close("all")


def test_points_have_no_line(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    series = [{"label": "roof", "x": [0.25, 4], "y": [1, 2]},
              {"label": "kernel", "x": [1], "y": [1], "points": True}]  # fmt: skip
    figure.draw({**SPEC, "log_x": True, "series": series, "lines": []}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert [line.get_linewidth() > 0 for line in axes.lines] == [True, False]
    assert "0.5" in [label.get_text() for label in axes.get_xticklabels()]  # not 0
    monkeypatch.undo()
    plt.close("all")


def test_ticks_are_numbers_that_there_are(monkeypatch, tmp_path):
    """No 1.5 nodes, and 0.05 s instead of five times ten to the minus two."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    series = [{"label": "latency", "x": [1, 2, 4], "y": [0.02, 0.05, 0.4]}]
    figure.draw({**SPEC, "log_y": True, "series": series, "lines": []}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert all(float(x).is_integer() for x in axes.get_xticks())
    assert "0.05" in [label.get_text() for label in axes.get_yticklabels()]
    monkeypatch.undo()
    plt.close("all")


def test_a_dashed_line_has_the_colour_of_the_one_before_it(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    series = [{"label": f"{i}", "x": [1, 2], "y": [i, i], "dashed": i % 2 == 1} for i in range(4)]
    figure.draw({**SPEC, "series": series, "lines": []}, tmp_path / "a.png")
    lines = drawn[0].axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    colours = [line.get_color() for line in lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    monkeypatch.undo()
    plt.close("all")


def test_a_timeline_has_a_row_for_each_series_and_a_colour_for_each_name(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    series = [{"label": "compute", "x": [[0, 2], [2, 5]], "y": ["forward", "backward"]},
              {"label": "network", "x": [[3, 4], [4.5, 7]], "y": ["all-reduce", "all-reduce"]},
              {"label": "disk", "x": [], "y": []}]  # fmt: skip
    spec = {**SPEC, "kind": "timeline", "series": series, "lines": [{"label": "end", "x": 5}]}
    figure.draw(spec, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    # [row from below, begin, length]
    bars = [(round(b.get_y() + 0.35), b.get_x(), b.get_width()) for b in axes.patches]
    assert bars == [(2, 0, 2), (2, 2, 3), (1, 3, 1), (1, 4.5, 2.5)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["disk", "network", "compute"]
    assert axes.get_xlabel() == SPEC["x_label"]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(named) == ["all-reduce", "backward", "end", "forward"]
    monkeypatch.undo()
    plt.close("all")


def test_arrays_and_long_series_are_drawn(tmp_path):
    long = {"label": "loss", "x": np.arange(500), "y": np.linspace(6, 2, 500)}
    figure.draw({**SPEC, "series": [long], "log_x": True, "log_y": True}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path):
    opened = plt.get_fignums()
    ragged = [{"label": "x", "x": [1, 2], "y": [1]}]
    with pytest.raises(ValueError):
        figure.draw({**SPEC, "series": ragged}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == opened


def test_draw_all_prefixes_the_names(tmp_path):
    few = {**SPEC, "series": SPEC["series"][:2]}
    record = {"figures": {"loss": few, "time": {**few, "kind": "bar"}}}
    paths = figure.draw_all(record, tmp_path / "new", prefix="smoke-")
    assert [path.name for path in paths] == ["smoke-loss.png", "smoke-time.png"]
    assert all(path.is_file() for path in paths)
