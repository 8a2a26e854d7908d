"""Running a block: the command line it becomes, and what its end amounts to."""

import json
import os
import sys
from pathlib import Path

import pytest

from distlab import record
from distlab.errors import RunError
from distlab.lab import blocks, lessons
from distlab.lab.blocks import command_line, judge, run_block, unmet_need
from distlab.lab.lessons import Block
from distlab.process import Completed

SCRIPT = "chapter01-introduction/code/x.py"
CHECKED = {"checks": [{"ok": True}], "metrics": {}, "comparisons": {}}
MEASURED = {"checks": [], "metrics": {"speed": {"value": 1}}, "comparisons": {}}
EMPTY = {"checks": [], "metrics": {}, "comparisons": {}}


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, without GPUs."""
    for module in (blocks, lessons):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(blocks, "gpu_count", lambda: 0)
    monkeypatch.setattr("distlab.process.GRACE_S", 0.5)
    return tmp_path


def block(text: str = f"python {SCRIPT}", **words) -> Block:
    return Block(lessons.repo_root() / "main.md", 3, 1, text, **words)


def ended(status: int = 0, stdout: str = "", stderr: str = "", left: tuple[str, ...] = ()):
    return Completed(status, stdout, stderr, 1.0, left)


@pytest.mark.parametrize(
    ("one", "completed", "records", "result", "why"),
    [
        (block, ended(stdout="check: x … ok (1)\n"), [], "ran", ""),
        (block, ended(), [CHECKED], "ran", ""),
        (block, ended(), [EMPTY, MEASURED], "ran", ""),
        (block, ended(stdout="hello\n"), [], "failed", "printed no check and no measurement"),
        (block, ended(), [EMPTY], "failed", "printed no check and no measurement"),
        (
            block,
            ended(1, "check: x … FAILED (2)\n"),
            [],
            "failed",
            "exit status 1, expected 0\ncheck",
        ),
        (block, ended(124), [CHECKED], "failed", "exit status 124, expected 0"),
        (block, ended(77, "SKIPPED: no GPU\n"), [], "skipped", "no GPU"),
        (block, ended(77, "no word of why\n"), [], "failed", "bare 77"),
        (
            block,
            ended(0, "check: x … ok", left=("7: sleep 9",)),
            [],
            "failed",
            "running: 7: sleep 9",
        ),
        (lambda: block(exit=2), ended(2, "", "error: no\n"), [], "ran", ""),
        (lambda: block(exit=2), ended(0, "check: x … ok\n"), [], "failed", "status 0, expected 2"),
        (lambda: block("lab list"), ended(stdout="chapter 1\n"), [], "ran", ""),
        (lambda: block("lab list"), ended(stdout=" \n"), [], "failed", "printed no check"),
    ],
)
def test_judge(one, completed, records, result, why):
    judged, reason = judge(one(), completed, records)
    assert judged == result
    assert why in reason and bool(reason) == bool(why)


def test_a_failure_shows_the_end_of_what_was_printed():
    _, reason = judge(
        block(), ended(1, "".join(f"line {n}\n" for n in range(99)), "error: x\n"), []
    )
    assert reason.splitlines()[1] == "line 75" and reason.splitlines()[-1] == "error: x"


@pytest.mark.parametrize(
    ("words", "backend", "gpus", "need"),
    [
        ({}, "gloo", 0, None),
        ({"gpus": 1}, "gloo", 0, "needs 1 GPU(s), 0 here"),
        ({"gpus": 1}, "gloo", 1, None),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "gloo", 0, None),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "nccl", 2, "needs 4 GPU(s), 2 here"),
        ({"text": "torchrun --nproc_per_node=4 x.py"}, "nccl", 4, None),
        (
            {"text": "torchrun --nproc_per_node=2 x.py", "nodes": 2},
            "nccl",
            2,
            "needs 4 GPU(s), 2 here",
        ),
        ({"nodes": 2}, "gloo", 0, "no cluster here"),
        ({"nodes": 2, "slurm": True}, "gloo", 0, "no Slurm here"),
        ({"text": "# eight machines\nx", "norun": True}, "gloo", 8, "norun: eight machines"),
    ],
)
def test_unmet_need(words, backend, gpus, need, monkeypatch):
    lacking = {False: "no cluster here", True: "no Slurm here"}
    monkeypatch.setattr(blocks.cluster, "unavailable", lambda slurm: lacking[slurm])
    told = unmet_need(block(**words), backend, gpus)
    assert told == need or told.startswith(need)


def test_a_block_of_nodes_is_run_on_each_and_one_of_slurm_on_the_head():
    shell = ["bash", "-euo", "pipefail", "-c", "hostname"]
    lab = [sys.executable, "-m", "distlab.lab", "cluster", "--nodes"]
    assert command_line(block("hostname")) == shell
    assert command_line(block("hostname", nodes=3)) == [*lab, "3", "--", *shell]
    with_slurm = block("hostname", nodes=2, slurm=True)
    assert command_line(with_slurm) == [*lab, "2", "--slurm", "--", *shell]


def test_a_block_runs_in_the_checkout_with_its_preset_and_folder(checkout):
    text = (
        'pwd; echo "$LAB_PRESET $LAB_RECORD_DIR [$CUDA_VISIBLE_DEVICES]"; python -V; echo err >&2'
    )
    outcome = run_block(block(text), "smoke", checkout / "records")
    assert outcome.result == "ran", outcome.reason
    version = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    expected = [str(checkout), f"smoke {checkout}/records []", version]
    assert outcome.stdout.splitlines() == expected
    assert outcome.stderr == "err\n" and outcome.seconds > 0


@pytest.mark.parametrize("text", ["false\necho on", "echo $NO_SUCH_VARIABLE", "false | cat"])
def test_the_first_failing_line_of_a_block_fails_it(text, checkout):
    outcome = run_block(block(text), "smoke", checkout / "records")
    assert outcome.result == "failed" and "exit status 1" in outcome.reason


def test_a_blocks_records_are_collected_and_old_ones_are_not(checkout):
    records = checkout / "records"
    records.mkdir()
    record.save({"schema": 1, **MEASURED, "run": "old"}, records / "old.json")
    (checkout / "new.json").write_text(json.dumps({"schema": 1, **MEASURED, "run": "new"}))
    half = 'echo "{" > "$LAB_RECORD_DIR/.x.json.tmp123.json"'  # a script was killed while writing
    text = f'cp new.json "$LAB_RECORD_DIR"\n{half}\n# {SCRIPT}'
    outcome = run_block(block(text), "smoke", records)
    assert outcome.result == "ran", outcome.reason
    assert [made["run"] for made in outcome.records] == ["new"]


def test_a_block_that_needs_what_is_not_here_is_not_started(checkout):
    outcome = run_block(block("touch started", gpus=1), "smoke", checkout / "records")
    assert (outcome.result, outcome.reason) == ("skipped", "needs 1 GPU(s), 0 here")
    assert not (checkout / "started").exists()


def test_a_block_past_its_limit_fails_and_is_ended(checkout):
    outcome = run_block(block("sleep 60 | cat"), "smoke", checkout / "records", timeout_s=0.5)
    assert outcome.result == "failed" and "exit status 124" in outcome.reason


def test_core_is_the_python_that_runs_the_lab():
    assert blocks.environment_python("core") == Path(sys.executable)
    assert os.access(blocks.environment_python("core"), os.X_OK)


def test_an_environment_that_cannot_be_had_is_tried_once(checkout, monkeypatch):
    """Each test that needs it would wait for minutes."""
    lab = "import sys; open('tried', 'a').write(sys.argv[2]); sys.exit(1)"
    (checkout / "scripts").mkdir(exist_ok=True)
    (checkout / "scripts" / "lab.py").write_text(lab)
    monkeypatch.chdir(checkout)
    blocks.unavailable_environments.cache_clear()
    for _ in range(2):
        with pytest.raises(RunError, match="environment absent could not be set up"):
            blocks.environment_python("absent")
    assert (checkout / "tried").read_text() == "absent"


def test_several_ranks_have_a_thread_each_unless_the_reader_says_otherwise(monkeypatch, tmp_path):
    """What torchrun would set, with a block of warnings."""

    def threads(text: str) -> str | None:
        environment = blocks.block_environment(block(text), "smoke", tmp_path, "gloo")
        return environment.get("OMP_NUM_THREADS")

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(f"torchrun --nproc_per_node=2 {SCRIPT}") == "1"
    assert threads(f"torchrun --nproc_per_node=1 {SCRIPT}") is None
    assert threads(f"python {SCRIPT}") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(f"torchrun --nproc_per_node=2 {SCRIPT}") == "3"


def test_torchrun_finds_a_host_whose_name_cannot_be_resolved(monkeypatch, tmp_path):
    """By its name it looks for itself for five minutes; PET_LOCAL_ADDR is its --local-addr."""
    several = block(f"torchrun --nproc_per_node=2 {SCRIPT}")
    monkeypatch.delenv("PET_LOCAL_ADDR", raising=False)
    for address, told in (("10.0.0.5", None), (None, "127.0.0.1")):
        monkeypatch.setattr(blocks, "own_address", lambda address=address: address)
        found = blocks.block_environment(several, "smoke", tmp_path, "gloo")
        assert found.get("PET_LOCAL_ADDR") == told
