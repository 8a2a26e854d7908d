"""A run: what it prints, what it records, and where."""

import argparse
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from distlab import record, script
from distlab import run as run_module
from distlab.errors import RunError, UsageError

SERIES = [{"label": "training", "x": [1, 2, 3], "y": [3.0, 2.0, 1.5]}]
AXES = {"title": "Loss", "x_label": "step", "y_label": "loss (nats)"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LAB_RECORD_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["small.py"])


def arguments(**flags) -> argparse.Namespace:
    return argparse.Namespace(
        **{"preset": "smoke", "json": None, "figures": None, "steps": 5, **flags}
    )


def test_the_record_holds_what_was_printed(tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "run.json"
    with script.run(arguments(json=str(path))) as run:
        run.print("hello")
        run.metric("tokens_per_second", 4312.4, "tok/s", note="median of 10")
        run.metric("peak_memory", None, "B")
        run.compare("state memory", predicted=1.2e6, measured=1.25e6, unit="B")
        run.table("workers", ["K", "max diff"], [[1, 0.0], [2, 3e-17]], caption="Workers")
        run.figure("loss", kind="line", series=SERIES, **AXES)
        run.extra(total_bytes=12)
        run.check_true("it holds", True, "seen")
        run.check_close("gradients", [1.0], [1.0], tolerance=1e-12)
        run.check_below("loss", 2.0, 5.9, "nats")
        run.check_above("speed-up", 1.9, 1.5)
    assert run.status == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("machine: ")
    assert lines[1:5] == [
        "hello",
        "tokens per second: 4,312 tok/s (median of 10)",
        "peak memory: unknown",
        "state memory: predicted 1.20 MB, measured 1.25 MB, error -4.0 %",
    ]
    assert lines[5] == "Workers"
    assert lines[-4:] == [
        "check: it holds … ok (seen)",
        "check: gradients … ok (max diff 0.0e+00, tolerance 1e-12)",
        "check: loss … ok (2 nats, limit 5.9 nats)",
        "check: speed-up … ok (1.9, at least 1.5 wanted)",
    ]
    assert printed.err == ""

    made = json.loads(path.read_text())
    assert made["schema"] == record.SCHEMA
    assert made["command"] == "python small.py"
    assert (made["preset"], made["world_size"]) == ("smoke", 1)
    assert made["arguments"] == {"preset": "smoke", "steps": 5}
    assert made["metrics"] == {
        "tokens_per_second": {"value": 4312.4, "unit": "tok/s"},
        "peak_memory": {"value": None, "unit": "B"},
    }
    assert made["comparisons"]["state memory"]["error"] == pytest.approx(-0.04)
    assert made["tables"]["workers"] == {
        "columns": ["K", "max diff"],
        "rows": [[1, 0.0], [2, 3e-17]],
        "caption": "Workers",
    }
    assert made["figures"]["loss"]["series"] == SERIES
    assert [item["ok"] for item in made["checks"]] == [True] * 4
    assert made["total_bytes"] == 12
    assert made["seconds"] >= 0
    assert {"cpu", "cores", "memory_bytes", "gpus"} <= made["machine"].keys()
    assert made["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_time_is_judged_by_its_interval_and_only_reported_at_smoke_size(capsys):
    slow = [9.0] * 8
    with script.run(arguments()) as run:
        assert run.check_within("cost", slow, 3.0, unit="%")
    with script.run(arguments(preset="laptop")) as run:
        assert not run.check_within("cost", slow, 3.0, unit="%")
        assert run.check_within("speed-up", slow, at_least=3.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "check: cost" in line]
    assert lines == [
        "check: cost … ok (not judged at this size: median 9 %, 95 % interval 9 to 9 % of 8, "
        "limit 3 %)",
        "check: cost … FAILED (median 9 %, 95 % interval 9 to 9 % of 8, limit 3 %)",
    ]


def test_a_failing_check_fails_the_run_and_is_recorded(tmp_path, capsys):
    path = tmp_path / "run.json"
    with script.run(arguments(json=str(path))) as run:
        assert run.check_equal("two", 2, 2)
        assert not run.check_equal("three", 2, 3)
        assert run.check_equal("four", 4, 4)
    assert run.status == 1
    assert "check: three … FAILED (2, expected 3)" in capsys.readouterr().out
    assert [item["ok"] for item in json.loads(path.read_text())["checks"]] == [True, False, True]


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_rank_1_is_silent_but_for_a_failing_check_and_records_nothing(
    variable, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("LAB_RECORD_DIR", str(tmp_path))
    with script.run(arguments(json=str(tmp_path / "run.json"), figures=str(tmp_path))) as run:
        run.print("hello")
        run.metric("speed", 1.0)
        run.compare("memory", 1.0, 1.0)
        run.table("t", ["a"], [[1]])
        run.figure("loss", kind="line", series=SERIES, **AXES)
        run.check_true("fine", True, "")
        assert list(run.progress([1, 2], "working")) == [1, 2]
        run.check_true("broken", False, "rank 1 differs")
    assert run.status == 1
    assert capsys.readouterr().out == "[rank 1] check: broken … FAILED (rank 1 differs)\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_an_exception_passes_through(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_RECORD_DIR", str(tmp_path / "records"))
    with (
        pytest.raises(RunError),
        script.run(arguments(json=str(tmp_path / "r.json"), figures=str(tmp_path))) as run,
    ):
        run.figure("loss", kind="line", series=SERIES, **AXES)
        raise RunError("a shard is corrupt")
    assert list(tmp_path.iterdir()) == []


def test_a_record_directory_keeps_every_run_of_the_same_script(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_RECORD_DIR", str(tmp_path / "records"))
    for _ in range(3):
        with script.run(arguments()):
            pass
    names = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert names == ["small-2.json", "small-3.json", "small.json"]
    assert record.load(tmp_path / "records" / "small-3.json")["preset"] == "smoke"


def test_figures_are_drawn_from_the_record_and_named(tmp_path, capsys):
    with script.run(arguments(figures=str(tmp_path / "drawn"))) as run:
        for kind in ("line", "area"):
            run.figure(kind, kind=kind, series=SERIES * 2, lines=[{"label": "a", "y": 2}], **AXES)
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed == [f"figure: {tmp_path}/drawn/{name}.png" for name in ("line", "area")]
    for path in (tmp_path / "drawn").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_can_be_drawn_again_from_the_saved_record_with_its_gaps(tmp_path):
    from distlab.figure import draw_all

    gap = [{"label": "measured", "x": ["a", "b"], "y": [1.0, float("nan")]}]
    with script.run(arguments(json=str(tmp_path / "r.json"), figures=str(tmp_path))) as run:
        for kind in ("line", "scatter", "bar"):
            run.figure(kind, kind=kind, series=gap, **AXES)
        run.figure("area", kind="area", series=[{**gap[0], "x": [1, 2]}], **AXES)
        run.figure("logs", kind="line", series=SERIES, **AXES, log_x=True, log_y=True)
    again = draw_all(record.load(tmp_path / "r.json"), tmp_path, prefix="again-")
    assert len(again) == 5
    for path in again:
        first = path.with_name(path.name.removeprefix("again-"))
        assert path.read_bytes() == first.read_bytes()  # so that redrawing it is no change


def test_an_unknown_kind_of_figure_is_refused_when_it_is_described():
    with (
        pytest.raises(ValueError, match="'pie' is no kind of figure"),
        script.run(arguments()) as run,
    ):
        run.figure("share", kind="pie", series=SERIES, **AXES)


@pytest.mark.parametrize("flag", ["json", "figures"])
def test_a_place_that_cannot_be_written_is_refused_before_the_run(flag, tmp_path):
    (tmp_path / "file").write_text("")
    beneath_a_file = str(tmp_path / "file" / "out")
    with (
        pytest.raises(UsageError, match=f"--{flag} .*file/out cannot be written: .+"),
        script.run(arguments(**{flag: beneath_a_file})),
    ):
        pytest.fail("the run began")


def test_json_into_a_folder_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match="is a folder; name a file"),
        script.run(arguments(json=str(tmp_path))),
    ):
        pytest.fail("the run began")


def test_figures_into_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="--figures .* is a file; name a folder"),
        script.run(arguments(figures=str(tmp_path / "file"))),
    ):
        pytest.fail("the run began")


def test_json_into_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with (
        pytest.raises(UsageError, match="is read-only"),
        script.run(arguments(json=str(tmp_path / "r.json"))),
    ):
        pytest.fail("the run began")


def test_json_to_a_device_never_replaces_it(tmp_path):
    with (
        pytest.raises(UsageError, match="/dev/null is no regular file"),
        script.run(arguments(json="/dev/null")),
    ):
        pytest.fail("the run began")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_values_of_numpy_and_none_are_recorded(tmp_path):
    path = tmp_path / "r.json"
    args = arguments(json=str(path), corpus=Path("text"), command=print)
    with script.run(args) as run:
        run.metric("loss", np.float32(0.5))
        run.compare("nothing", predicted=1.0, measured=0.0)
        run.table("t", ["x"], [[np.int64(3)], [None], [float("inf")]])
    made = json.loads(path.read_text())
    assert made["arguments"] == {"preset": "smoke", "steps": 5, "corpus": "text"}
    assert made["metrics"]["loss"]["value"] == 0.5
    assert made["comparisons"]["nothing"]["error"] is None
    assert made["tables"]["t"]["rows"] == [[3], [None], [None]]


def test_progress_goes_to_standard_error_every_ten_seconds(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(now))
    run = script.run(arguments())
    assert list(run.progress(range(6), "training")) == list(range(6))
    assert list(run.progress(iter("ab"), "reading")) == ["a", "b"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() and all(
        line.startswith("training: ") and line.endswith("/6") for line in printed.err.splitlines()
    )


def test_progress_on_a_terminal_is_a_bar_that_vanishes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(script.run(arguments()).progress(range(3), "training")) == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_an_error_against_a_measurement_of_zero_is_unknown(capsys):
    with script.run(arguments()) as run:
        run.compare("memory", predicted=1.0, measured=0.0, unit="B")
    assert run.comparisons["memory"]["error"] is None
    assert "error unknown" in capsys.readouterr().out
