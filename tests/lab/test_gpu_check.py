"""scripts/gpu_check.sh: what it would run on GPUs, and that it says so where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlab.errors import UsageError
from distlab.files import repo_root
from distlab.lab import gpu_check
from distlab.lab.lessons import Block

TORCHRUN = "torchrun --nproc_per_node=4 chapter01-introduction/code/multi_gpu_ddp.py"


def block(text: str) -> Block:
    return Block(repo_root() / "README.md", 1, 0, text)


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (8, 4)])
def test_a_gpu_for_each_rank_and_two_ranks_that_share_one(monkeypatch, gpus, ranks):
    monkeypatch.setattr(gpu_check, "gpu_count", lambda: gpus)
    own, shared = gpu_check.variants(block(TORCHRUN))
    assert own.text == TORCHRUN.replace("=4", f"={ranks}")
    assert shared.text == TORCHRUN.replace("=4", "=2") + " --backend gloo --device cuda"
    assert (own.ranks, shared.ranks) == (ranks, 2)


def test_one_process_has_no_second_variant(monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_count", lambda: 1)
    (own,) = gpu_check.variants(block("python chapter01-introduction/code/workloads.py"))
    assert own.text == "python chapter01-introduction/code/workloads.py"


def test_what_would_set_up_an_environment_is_left_out():
    assert gpu_check.runs_here(block(TORCHRUN))
    assert not gpu_check.runs_here(block(f"python3 scripts/lab.py cluster --nodes 2 -- {TORCHRUN}"))


@pytest.mark.parametrize(("status", "there", "ends"), [(0, True, 0), (1, True, 1), (0, False, 1)])
def test_the_tests_that_need_a_gpu(monkeypatch, status, there, ends):
    asked = []

    def run(command, **_):
        asked.append([Path(word).name for word in command])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(gpu_check, "gpu_count", lambda: 1)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: there or None)
    assert gpu_check.main(["--steps", "tests"]) == ends
    if there:
        ((*_, mark, value, first, second, third),) = asked
        assert (mark, value) == ("-m", "gpu")
        assert [first, second, third] == [
            "test_data_loader.py",
            "test_attention_triton.py",
            "test_parity_transformers.py",
        ]


def test_one_chapter_of_those_written(monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_count", lambda: 1)
    played = []
    monkeypatch.setattr(gpu_check, "run", lambda blocks, *_: played.extend(blocks) or [])
    assert gpu_check.main(["--steps", "smoke", "--chapters", "6"]) == 1  # nothing came of them
    assert played and {each.lesson.parent.name for each in played} == {"chapter06-vllm"}
    with pytest.raises(UsageError, match="--chapters 8 is not written; use some of"):
        gpu_check.main(["--chapters", "8"])


def test_without_a_gpu_it_says_so_with_status_77(tmp_path: Path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", str(tmp_path / "out")],
        cwd=repo_root(), env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (77, "SKIPPED: torch sees no GPU on this machine\n")
