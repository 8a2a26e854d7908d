"""What scripts/lab.py is made of: torch's build, uv's settings, messages, progress, pins."""

import os
import re
from pathlib import Path

import pytest

from distlab.environments import progress, recipes, uv


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("ERROR: Could not find X (from versions: none)", "no package index can be reached"),
        (
            "error: No solution found\n  cause: Because a wants b",
            "no index has what the lock names: c",
        ),
        (
            "The virtual environment: ensurepip is not available",
            "this Python has neither pip nor venv; ",
        ),
        ("error: first\n  ERROR: pins conflict\nhint: see above\n", "ERROR: pins conflict"),
        ("what\never\n", "ever"),
        ("", "no output"),
    ],
)
def test_a_failed_command_is_explained(
    output: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "FOLDER", tmp_path)
    monkeypatch.setattr(uv, "forbids_indexes", lambda: False)
    explanation = progress.explain(output)
    assert explanation.startswith(line) and "\n" not in explanation


@pytest.mark.parametrize(("value", "forbids"), [("1", True), ("true", True), ("0", False)])
def test_who_forbids_indexes_is_told_so(
    value: str, forbids: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "FOLDER", tmp_path)
    monkeypatch.setattr(uv, "FOLDER", tmp_path)
    monkeypatch.setattr(uv, "pip_settings", lambda: {"no-index": value})
    monkeypatch.delenv("UV_NO_INDEX", raising=False)
    told = progress.explain("error: No solution found")
    assert told.startswith("no index may be asked (PIP_NO_INDEX, ") == forbids


def test_torch_build_follows_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.setattr(recipes, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recipes.torch_build(None) == "cpu"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert recipes.torch_build(None) == "cuda"
    assert recipes.torch_build("cpu") == "cpu"
    assert recipes.torch_build(None) == "cpu", "remembered"
    assert recipes.torch_build("auto") == "cuda"


def test_uv_is_given_the_configuration_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/mine")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/a http://127.0.0.1:9/b")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("PYTHONPATH", "/misleading")
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/for-uv")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("UV_SYSTEM_PYTHON", "1")
    uv.pip_settings.cache_clear()
    variables = uv.uv_variables()
    uv.pip_settings.cache_clear()
    assert not {"PIP_TARGET", "UV_SYSTEM_PYTHON"} & variables.keys()
    assert variables["UV_INDEX"] == "http://127.0.0.1:9/a http://127.0.0.1:9/b"
    assert variables["UV_FIND_LINKS"] == "/wheels,/more"
    assert "UV_DEFAULT_INDEX" not in variables, "the user told uv otherwise"
    assert "PYTHONPATH" not in variables


def test_progress_is_a_plain_line_every_ten_seconds_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = iter([0.0, 9.0, 9.0, 10.5, 10.5, 10.5, 11.0, 11.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = progress.Progress("core")
    for package in ("numpy", "rich", "torch"):
        shown.show(f"Downloading {package} (1.0MiB)\nother talk\n")
    assert capsys.readouterr().err == "lab: core  10 s  Downloading rich (1.0MiB)\n"


def test_every_environment_is_locked_and_its_pins_stand_in_its_lock() -> None:
    project = recipes.pyproject()
    for name in recipes.names():
        for torch in recipes.BUILDS:
            environment = recipes.read(name, torch)
            locked = pins(environment.lock.read_text().splitlines())
            extras = project["project"]["optional-dependencies"][environment.extra]
            wanted = [re.sub(r"\[.*?\]|;.*", "", line).strip() for line in extras]
            assert set(wanted) <= locked, f"python3 scripts/lab.py lock {name}"
            assert environment.alone or f"torch=={environment.torch_version}" in locked


def pins(lines: list[str]) -> set[str]:
    found = [line.partition(" ;")[0] for line in lines if not line.startswith(("#", " "))]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in found)
    return set(found)
