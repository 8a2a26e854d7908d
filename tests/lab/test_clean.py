"""`lab clean` names what is not needed, removes it when told so, and nothing else."""

import json
import os

import pytest

from distlab.environments import recipes
from distlab.lab import clean


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two environments, one of them with old pins; a stranger's folder; downloads; a log."""
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    for name in ("vllm", "bench", "gone"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
        (tmp_path / name / "pyvenv.cfg").write_text("home = /\n")
    digest = recipes.read("vllm", recipes.torch_build()).digest
    (tmp_path / "vllm" / ".lab-stamp.json").write_text(json.dumps({"digest": digest}))
    (tmp_path / "bench" / ".lab-stamp.json").write_text(json.dumps({"digest": "old"}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "wheel").write_bytes(b"x" * 3_000_000)
    (tmp_path / "vllm.log").touch()
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_it_names_what_is_not_needed_and_removes_nothing(folder, capsys):
    before = names(folder)
    assert clean.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("bench", "gone", "cache"):
        assert str(folder / name) in printed
    assert str(folder / "vllm") not in printed and str(folder / "mine") not in printed
    assert "3.00" in printed and "add --yes" in printed
    assert names(folder) == before


def test_with_yes_it_removes_that_and_nothing_else(folder, capsys):
    assert clean.main(["--yes"]) == 0
    assert names(folder) == {"vllm", "mine", "vllm.log"}
    assert clean.main(["--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_an_environment_that_is_named_goes_though_it_is_up_to_date(folder):
    assert clean.main(["vllm", "--yes"]) == 0
    assert names(folder) == {"bench", "gone", "mine", "cache"}


def test_links_from_elsewhere_count_nothing(folder):
    os.link(folder / "cache" / "wheel", folder / "bench" / "wheel")
    assert clean.Unneeded(folder / "bench", "").bytes < 1000


@pytest.mark.parametrize("name", ["core", "nope"])
def test_what_must_stay_and_what_is_unknown_are_refused(folder, name):
    before = names(folder)
    with pytest.raises(clean.UsageError, match=f"{name} is not to be removed; name .*vllm"):
        clean.main([name, "--yes"])
    assert names(folder) == before
