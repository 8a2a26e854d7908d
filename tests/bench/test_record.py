"""A record: the command as typed, plain JSON, written whole or not at all."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distlab import record
from distlab.errors import RunError
from distlab.files import repo_root

LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_", "OMPI_", "PMI_",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


def argv(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", list(words))


def test_command_line_names_the_script_from_the_repository_root(monkeypatch):
    script = repo_root() / "chapter01-introduction" / "code" / "x.py"
    argv(monkeypatch, str(script), "--corpus", "my texts", "--steps=3")
    expected = "python chapter01-introduction/code/x.py --corpus 'my texts' --steps=3"
    assert record.command_line() == expected
    monkeypatch.chdir(script.parents[1])
    argv(monkeypatch, "code/x.py")
    assert record.command_line() == "python chapter01-introduction/code/x.py"


def test_command_line_of_a_script_elsewhere_is_its_name_alone(monkeypatch, tmp_path):
    argv(monkeypatch, str(tmp_path / "mine.py"), "--steps", "3")
    assert record.command_line() == "python mine.py --steps 3"


@pytest.mark.parametrize(
    ("world", "local", "launcher"),
    [
        (1, 1, "torchrun --nproc_per_node=1"),
        (4, 4, "torchrun --nproc_per_node=4"),
        (8, 4, "torchrun --nnodes=2 --nproc_per_node=4"),
    ],
)
def test_command_line_of_torchrun(world, local, launcher, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    argv(monkeypatch, "train.py", "--steps", "3")
    assert record.command_line() == f"{launcher} train.py --steps 3"


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4", "RANK": "0"}, 4),
        ({"SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}, 3),
        ({"SLURM_NTASKS": "3"}, 1),  # a plain `python` in an sbatch script is one process
    ],
)
def test_world_size_is_that_of_the_launcher(variables, world, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert record.describe_run("smoke")["world_size"] == world


def test_command_line_on_the_virtual_cluster_begins_with_the_line_that_made_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("LAB_CLUSTER", "python3 scripts/lab.py cluster --nodes 2")
    expected = "python3 scripts/lab.py cluster --nodes 2 -- python train.py"
    assert record.command_line() == expected


def test_command_line_of_srun(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    argv(monkeypatch, "train.py", "--steps", "3")
    assert record.command_line() == "python train.py --steps 3"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert record.command_line() == "srun --ntasks=4 python train.py --steps 3"


def test_a_record_holds_no_path_and_no_name_of_this_machine(monkeypatch):
    argv(monkeypatch, str(repo_root() / "chapter01-introduction" / "x.py"))
    text = json.dumps(record.describe_run("smoke"))
    for private in (str(repo_root()), str(Path.home()), sys.prefix, socket.gethostname()):
        assert private not in text


def test_commit_marks_a_changed_checkout(monkeypatch, tmp_path):
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, timeout=20)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    clean = record.commit()
    assert clean and len(clean) == 12
    (tmp_path / "record.py").write_text("x = 1\n")
    subprocess.run(["git", "add", "record.py"], cwd=tmp_path, check=True, timeout=20)
    assert record.commit() == f"{clean}+"


def test_commit_is_none_without_a_checkout_without_git_and_when_git_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.commit() is None

    def hang(*args, **options):
        raise subprocess.TimeoutExpired("git", 20)

    with monkeypatch.context() as patch:
        patch.setattr(record.subprocess, "run", hang)
        assert record.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit() is None


def test_save_makes_plain_json_of_what_scripts_hold(tmp_path):
    import torch

    path = tmp_path / "r.json"
    value = {
        "schema": 1,
        "nan": float("nan"),
        "infinite": [float("inf"), -math.inf, np.float32("nan")],
        "array": np.arange(3),
        "bool": np.bool_(True),
        "bfloat16": torch.tensor([0.5, float("nan")], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "tuple": (1, 2.5),
        "path": Path("texts") / "a",
        3: "three",
        "dtype": torch.bfloat16,
    }
    record.save(value, path)
    assert record.load(path) == {
        "schema": 1,
        "nan": None,
        "infinite": [None, None, None],
        "array": [0, 1, 2],
        "bool": True,
        "bfloat16": [0.5, None],
        "scalar": 3,
        "tuple": [1, 2.5],
        "path": "texts/a",
        "3": "three",
        "dtype": "torch.bfloat16",
    }
    assert "NaN" not in path.read_text() and path.read_text().endswith("\n")


def test_a_value_that_json_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="set"):
        record.save({"schema": 1, "ranks": {1, 2}}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
    max_leaves=10,
)


@given(value=json_values)
def test_what_is_saved_is_loaded_again(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    record.save({"schema": record.SCHEMA, "value": value}, path)
    assert record.load(path)["value"] == value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"schema": 1',
        b"[1, 2]",
        b"3",
        b'{"schema": 99}',
        b'{"metrics": {}}',
        b"[" * 100_000,
    ],
)
def test_load_refuses_what_is_no_record_in_one_error_that_names_the_file(content, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match="bad.json"):
        record.load(path)


def test_load_of_a_missing_file_or_a_folder_names_it(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RunError, match=path.name):
            record.load(path)


def test_command_line_of_mpirun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name, value in {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert record.command_line() == "mpirun -n 4 python train.py"
