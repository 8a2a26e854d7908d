"""What scripts/lab.py is made of: torch's build, uv's settings, messages, progress, pins."""

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_repo import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
import lab_environment
import lab_install
import lab_output


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("ERROR: Could not find X (from versions: none)", "no package index that can be reached"),
        ("The virtual environment: ensurepip is not available", "this Python has no venv; "),
        ("error: first\n  ERROR: pins conflict\nhint: see above\n", "ERROR: pins conflict"),
        ("what\never\n", "ever"),
        ("", "no output"),
    ],
)
def test_a_failed_command_is_explained(
    output: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lab_output, "FOLDER", tmp_path)
    explanation = lab_output.explain(output, lab_environment.read("core", "cpu"))
    assert explanation.startswith(line) and "\n" not in explanation


def test_torch_build_follows_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_environment, "FOLDER", tmp_path)
    monkeypatch.setattr(lab_environment, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lab_environment.torch_build(None) == "cpu"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert lab_environment.torch_build(None) == "cuda"
    assert lab_environment.torch_build("cpu") == "cpu"
    assert lab_environment.torch_build(None) == "cpu", "remembered"
    assert lab_environment.torch_build("auto") == "cuda"


def test_uv_is_given_the_configuration_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/mine")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/a http://127.0.0.1:9/b")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("PYTHONPATH", "/misleading")
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/for-uv")
    variables = lab_install.installing_variables(uses_uv=True)
    assert variables["UV_INDEX"] == "http://127.0.0.1:9/a http://127.0.0.1:9/b"
    assert variables["UV_FIND_LINKS"] == "/wheels,/more"
    assert "UV_DEFAULT_INDEX" not in variables, "the user told uv otherwise"
    assert "PYTHONPATH" not in variables


def test_progress_is_a_plain_line_every_ten_seconds_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = iter([0.0, 9.0, 9.0, 10.5, 10.5, 10.5, 11.0, 11.0])
    monkeypatch.setattr(lab_output.time, "monotonic", lambda: next(clock))
    progress = lab_output.Progress("core")
    for package in ("numpy", "rich", "torch"):
        progress.show(f"Collecting {package}==1.0 (from -c pins (line 3))\nother talk\n")
    assert capsys.readouterr().err == "lab: core  10 s  Collecting rich==1.0\n"


def test_recipes_pins_and_constraints_agree() -> None:
    root = SCRIPTS.parent
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    lab, extras = pyproject["tool"]["lab"], pyproject["project"]["optional-dependencies"]
    constraints = set(pins((root / "constraints/core.txt").read_text().splitlines()))
    assert set(pins(extras["core"])) <= constraints
    assert f"torch=={lab['torch']}" in constraints
    for name in lab["environments"]:
        for torch in ("cpu", "cuda"):
            assert lab_environment.read(name, torch).steps


def pins(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line} is no plain pin"
            yield line.lower().replace("_", "-")
