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
